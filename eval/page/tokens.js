"use strict";
// A completion token by token, with a colour for each.

// What numbers of the page are multiples of (see eval/report_samples.py).
Report.tokenView = { unit: 1e4, gapUnit: 1e7 };

Report.tokenView.KINDS = [
  ["", "no colours"],
  ["logprob", "logprob of the sampler"],
  ["advantage", "advantage"],
  ["gap", "ratio learner / sampler"],
  ["reference", "ratio to the reference"],
];

/** The value of a token as the sampler, the learner or the reward gave it; null where it was not kept. */
Report.tokenView.value = function (kind, tokens, place, sample) {
  const { unit, gapUnit } = Report.tokenView;
  if (kind === "advantage" && !tokens.advantage) return sample.advantage;
  const value = tokens[kind]?.[place];
  if (value === null || value === undefined) return null;
  return value / (kind === "gap" ? gapUnit : unit);
};

/** The largest absolute value of a kind, to which its colours are scaled. */
Report.tokenView.most = function (kind, tokens, sample) {
  const values = tokens.ids.map((_, place) => Math.abs(Report.tokenView.value(kind, tokens, place, sample) ?? 0));
  return Math.max(...values, 1e-9);
};

/** A background: red for what is unlikely, below zero or less than one; blue for the other side. */
Report.tokenView.background = function (kind, value, most) {
  if (value === null) return "";
  if (kind === "logprob") return Report.color("bad", Math.min(0.75, (-value / 5) * 0.75).toFixed(3));
  return Report.color(value < 0 ? "bad" : "accent", (0.65 * Math.min(1, Math.abs(value) / most)).toFixed(3));
};

Report.tokenView.legend = function (kind, tokens, sample) {
  const { most } = Report.tokenView;
  const largest = () => Report.number(most(kind, tokens, sample));
  if (kind === "logprob") return "The redder, the less likely: fullest at 5 nats and more (a probability below 0.7%).";
  if (kind === "advantage") return tokens.advantage ? `Blue above zero, red below; fullest at ${largest()}.` : "One advantage for the whole completion.";
  if (kind === "gap") return tokens.gap ? `Blue where the learner gives the token more than the sampler did, red where less; fullest at a log-ratio of ${largest()}.` : "The learner did not score this completion before the step.";
  if (kind === "reference") return tokens.reference ? `Blue where the policy gives the token more than the reference, red where less; fullest at a log-ratio of ${largest()}.` : "The run had no reference, or did not score this completion.";
  return "";
};

/** All that is known of one token, in words. */
Report.tokenView.words = function (tokens, place, sample) {
  const { value } = Report.tokenView;
  const { number } = Report;
  const logprob = value("logprob", tokens, place, sample);
  const parts = [`token ${place + 1} of ${tokens.ids.length}: id ${tokens.ids[place]}`, `logprob ${number(logprob)} (${Report.percent(Math.exp(logprob))})`];
  const advantage = value("advantage", tokens, place, sample);
  if (advantage !== null) parts.push(`advantage ${number(advantage)}`);
  const gap = value("gap", tokens, place, sample);
  if (gap !== null) parts.push(`learner / sampler ${Math.exp(gap).toFixed(7)}`);
  const reference = value("reference", tokens, place, sample);
  if (reference !== null) parts.push(`policy / reference ${number(Math.exp(reference))}`);
  return parts.join(", ");
};

/**
 * Elements for the tokens, and how to walk through them.
 * `parts` are the pieces of the text that the page shows apart, e.g. the reasoning: [first character, one after the last].
 */
Report.tokenView.spans = function (kind, tokens, sample, parts) {
  const most = kind ? Report.tokenView.most(kind, tokens, sample) : 1;
  const found = parts.map(() => []);
  let character = 0;
  tokens.texts.forEach((text, place) => {
    const value = kind ? Report.tokenView.value(kind, tokens, place, sample) : null;
    const span = Report.element("span", { class: text ? "token" : "token special", text: text || "∎", style: { backgroundColor: Report.tokenView.background(kind, value, most) } });
    span.dataset.place = place;
    // A token belongs to the part that its first character is in.
    let part = parts.findIndex(([from, to]) => character >= from && character < to);
    if (part < 0) part = parts.length - 1;
    found[part].push(span);
    character += text.length;
  });
  return found;
};
