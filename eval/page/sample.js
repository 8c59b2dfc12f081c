"use strict";
// One sample: prompt, completion with its reasoning folded, rewards, tokens, and what became of the same prompt elsewhere.

Report.sample = { shown: null, unfolded: false, kind: "", other: null };

Report.sample.show = async function (sample) {
  const { element, sample: view } = Report;
  const place = Report.byId("sample");
  view.shown = sample;
  if (!sample) {
    place.replaceChildren(element("p", { class: "faint", text: "No sample is chosen." }));
    return;
  }
  await Report.texts(sample.block);
  const tokens = await Report.tokens(sample);
  if (view.shown !== sample) return; // another one was chosen meanwhile
  const episode = sample.block.texts.episodes[sample.row];
  place.replaceChildren(
    view.facts(sample),
    element("h3", { text: "prompt" }),
    element("div", { class: "text", text: Report.promptText(sample) }),
    element("h3", { text: "completion" }),
    ...view.completion(sample, tokens),
    ...(episode ? [element("h3", { text: "all turns" }), element("div", { class: "text", text: episode })] : []),
    element("h3", { text: "reward" }),
    view.rewards(sample),
    ...view.comparison(sample),
  );
};

Report.sample.facts = function (sample) {
  const { element, number } = Report;
  const facts = {
    reward: number(sample.reward), advantage: sample.advantage === null || sample.advantage === undefined ? null : number(sample.advantage), answer: sample.answer,
    from: Report.sourceLabel(sample.source), mode: sample.mode, run: Report.data.runs.length > 1 ? sample.run.name : null, tokens: sample.length,
    ended: sample.finish === "length" ? "cut off at the length limit" : sample.finish, version: sample.version, task: sample.task, id: sample.id,
    ...sample.block.texts.extras[sample.row],
  };
  const rows = Object.entries(facts).filter(([, value]) => value !== null && value !== undefined);
  return element("dl", { class: "facts" }, ...rows.map(([name, value]) => element("div", {}, element("dt", { text: name }), element("dd", { text: String(value) }))));
};

/** Where reasoning begins and ends: [[from, to, isReasoning], ...], all of the text together. */
Report.sample.parts = function (text) {
  const start = text.indexOf("<think>");
  if (start < 0) return [[0, text.length + 1, false]];
  const close = text.indexOf("</think>", start);
  const end = close < 0 ? text.length + 1 : close + "</think>".length;
  return [[0, start, false], [start, end, true], [end, text.length + 1, false]].filter(([from, to]) => to > from);
};

Report.sample.completion = function (sample, tokens) {
  const { element, sample: view } = Report;
  const text = Report.completion(sample);
  const parts = view.parts(text);
  const spans = tokens ? Report.tokenView.spans(view.kind, tokens, sample, parts) : null;
  const nodes = parts.map(([from, to, isReasoning], place) => {
    const inside = spans ? spans[place] : [text.slice(from, to)];
    if (!isReasoning) return element("span", {}, ...inside);
    const length = Math.min(to, text.length) - from;
    return element("details", { open: view.unfolded || Boolean(view.kind), class: "reasoning" }, element("summary", { text: `reasoning, ${Report.number(length)} characters` }), ...inside);
  });
  const body = element("div", { class: "text completion" }, ...(text || spans ? nodes : [element("span", { class: "faint", text: "(nothing)" })]));
  const unfold = element("input", { type: "checkbox", onchange: () => view.unfold(unfold.checked) });
  unfold.checked = view.unfolded;
  const bar = element("div", { class: "bar" }, element("label", {}, unfold, "unfold reasoning"));
  if (!tokens) return [bar, body];
  const menu = element("select", { id: "token-kind", onchange: () => view.paint(menu.value) });
  Report.fillMenu(menu, Report.tokenView.KINDS);
  menu.value = view.kind;
  bar.append(element("label", { text: "colour tokens by " }, menu));
  const spoken = element("p", { class: "hint", role: "status", text: view.kind ? Report.tokenView.legend(view.kind, tokens, sample) : "Point at a token, or walk through them with the arrow keys." });
  view.walk(body, spoken, tokens, sample);
  return [bar, body, spoken];
};

/** Says what is known of the token under the mouse, or the one that the arrow keys came to. */
Report.sample.walk = function (body, spoken, tokens, sample) {
  let current = null;
  const go = (span) => {
    current?.classList.remove("current");
    current = span;
    span.classList.add("current");
    spoken.textContent = Report.tokenView.words(tokens, Number(span.dataset.place), sample);
  };
  body.tabIndex = 0;
  body.setAttribute("aria-label", "completion, arrow keys walk through its tokens");
  body.addEventListener("mouseover", (event) => {
    const span = event.target.closest(".token");
    if (span) go(span);
  });
  body.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || event.target !== body) return;
    event.preventDefault();
    const spans = [...body.querySelectorAll(".token")];
    go(spans[Math.max(0, Math.min(spans.length - 1, current ? spans.indexOf(current) + move : 0))]);
  });
};

Report.sample.unfold = function (isUnfolded) {
  Report.sample.unfolded = isUnfolded;
  document.querySelectorAll("#sample details.reasoning").forEach((part) => { part.open = isUnfolded; });
  const box = document.querySelector("#sample .bar input[type=checkbox]");
  if (box) box.checked = isUnfolded;
};

Report.sample.paint = async function (kind) {
  Report.sample.kind = kind;
  await Report.sample.show(Report.sample.shown);
  Report.byId("token-kind")?.focus();
};

/** A row for each reward: what it said, its weight, and what that makes. */
Report.sample.rewards = function (sample) {
  const { rows } = sample.block;
  const weights = new Map(sample.run.rewards.map((reward) => [reward.name, reward]));
  const names = Object.keys(rows.components).filter((name) => rows.components[name][sample.row] !== null);
  if (!names.length) return Report.element("p", { text: `${Report.number(sample.reward)} (one score, without parts)` });
  const parts = names.map((name) => {
    const score = rows.components[name][sample.row];
    const { weight = 1, clip = null } = weights.get(name) ?? {};
    const clipped = clip ? Math.min(clip[1], Math.max(clip[0], score)) : score;
    return [name, score, weight, clipped * weight, rows.statuses[name]?.[sample.row] ?? "ok"];
  });
  return Report.table(["reward", "score", "weight", "counts", "judge"], [...parts, ["together", "", "", sample.reward, ""]]);
};

/** A menu of other completions of the same prompt, and the words in which the chosen one differs. */
Report.sample.comparison = function (sample) {
  const { element } = Report;
  const others = Report.data.byPrompt.get(sample.id).filter((other) => other !== sample);
  if (!others.length) return [];
  const label = (other) => [Report.data.runs.length > 1 ? other.run.name : null, Report.sourceLabel(other.source), other.mode, `reward ${Report.number(other.reward)}`].filter(Boolean).join(", ");
  const menu = element("select", { id: "compare" });
  Report.fillMenu(menu, [["", `choose one of ${others.length}`], ...others.map((other, place) => [place, label(other)])]);
  const result = element("div", { class: "text difference", hidden: true });
  menu.addEventListener("change", async () => {
    result.hidden = menu.value === "";
    if (result.hidden) return;
    const other = others[Number(menu.value)];
    await Report.texts(other.block);
    const [before, after] = [Report.completion(other), Report.completion(sample)];
    result.replaceChildren(...(before === after ? [element("span", { class: "faint", text: "word for word the same" })] : Report.diff.texts(before, after)));
  });
  const title = element("h3", { text: "compared with another completion of this prompt" });
  const hint = element("p", { class: "hint" }, element("del", { text: "struck out" }), " is the other's, ", element("ins", { text: "marked" }), " is this one's.");
  return [title, element("label", { text: "the other " }, menu), result, hint];
};
