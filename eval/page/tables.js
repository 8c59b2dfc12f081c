"use strict";
// Overview, evaluations, data, recipe and environment: what is read rather than drawn.

Report.tables = {};

Report.tables.draw = function () {
  const { tables } = Report;
  const inside = (id) => document.querySelector(`#${id} > div`);
  inside("overview").replaceChildren(...tables.overview());
  tables.fill("evaluation", tables.evaluation());
  tables.fill("funnel", tables.funnel());
  inside("recipe").replaceChildren(...tables.recipe());
};

/** Puts parts into a section; a section without any is not shown. */
Report.tables.fill = function (id, parts) {
  Report.byId(id).hidden = !parts.length;
  document.querySelector(`nav a[href="#${id}"]`).hidden = !parts.length;
  document.querySelector(`#${id} > div`).replaceChildren(...parts);
};

Report.tables.overview = function () {
  const last = (run, name) => (run.metrics[name] ?? []).findLast((value) => value !== null);
  const shown = [["reward", "reward/mean"], ["loss", "train/loss"], ["length", "completion/length_mean"], ["entropy", "policy/entropy"], ["parity gap", "parity/logprob_abs_max"], ["MaxVio", "router/max_violation"], ["tokens/s", "throughput/tokens_per_second"]]
    .filter(([, name]) => Report.data.runs.some((run) => last(run, name) !== undefined));
  const rows = Report.data.runs.map((run) => [
    run.name, run.stage, `${Report.number(run.steps)}${run.max_steps ? ` of ${Report.number(run.max_steps)}` : ""}`,
    run.finished ? "finished" : run.finished === false ? "ended early" : "no summary yet", Report.seconds(run.seconds),
    ...shown.map(([, name]) => last(run, name) ?? ""), run.samples,
  ]);
  const parts = [Report.table(["run", "stage", "steps", "state", "time", ...shown.map(([label]) => label), "completions"], rows)];
  for (const run of Report.data.runs) {
    for (const alarm of run.alarms) parts.push(Report.element("p", { class: "bad", text: `${run.name}, audit, step ${alarm.step}: ${alarm.alarm}` }));
  }
  return parts;
};

Report.tables.evaluation = function () {
  const { element } = Report;
  const runs = Report.shownRuns().filter((run) => run.evaluation.length);
  if (!runs.length) return [];
  const columns = runs.flatMap((run) => [...new Set(run.evaluation.map((row) => row.moment))].map((moment) => ({ run, moment })));
  const names = [...new Set(runs.flatMap((run) => run.evaluation.map((row) => row.name)))];
  const rows = names.map((name) => [
    name,
    ...columns.map(({ run, moment }) => {
      const found = run.evaluation.find((row) => row.name === name && row.moment === moment);
      return found ? Report.tables.figure(found) : "";
    }),
  ]);
  const head = ["", ...columns.map(({ run, moment }) => (runs.length > 1 ? `${run.name}, ${moment}` : moment))];
  const note = "Bars are 95% intervals on a scale from 0 to 100%; n is the number of problems.";
  const published = runs.filter((run) => run.comparison).map((run) => element("details", {}, element("summary", { text: `${run.name}: beside published numbers` }), element("pre", { tabindex: 0, text: run.comparison })));
  return [Report.table(head, rows), element("p", { class: "hint", text: note }), ...published];
};

/** A figure with its interval in numbers and as a bar, or a plain number. */
Report.tables.figure = function (found) {
  const { element, percent, number } = Report;
  const isFraction = found.low !== undefined && found.low !== null && found.low >= 0 && found.high <= 1;
  if (!isFraction) {
    const interval = found.low !== undefined && found.low !== null ? ` [${number(found.low)}, ${number(found.high)}]` : "";
    return element("span", { text: number(found.value) }, element("small", { text: interval + (found.n ? ` n=${found.n}` : "") }));
  }
  const bar = element("span", { class: "interval", "aria-hidden": "true" },
    element("span", { style: { left: `${100 * found.low}%`, width: `${100 * (found.high - found.low)}%` } }),
    element("b", { style: { left: `${100 * found.value}%` } }));
  const words = element("span", {}, element("strong", { text: percent(found.value) }), element("small", { text: ` [${percent(found.low)}, ${percent(found.high)}] n=${number(found.n)}` }));
  return element("div", {}, bar, " ", words);
};

Report.tables.funnel = function () {
  const { element } = Report;
  const parts = [];
  for (const run of Report.shownRuns()) {
    if (!run.funnel.length) continue;
    const most = {};
    for (const { unit, count } of run.funnel) most[unit] = Math.max(most[unit] ?? 0, count);
    const bars = run.funnel.flatMap(({ label, count, unit }) => [
      element("span", { text: label }),
      element("i", { "aria-hidden": "true", style: { width: `${(100 * count) / (most[unit] || 1)}%` } }),
      element("span", { text: `${Report.number(count)} ${unit}${count === most[unit] ? "" : ` (${Report.percent(count / most[unit])})`}` }),
    ]);
    parts.push(element("h3", { text: run.name }), element("div", { class: "funnel" }, ...bars));
  }
  return parts;
};

Report.tables.recipe = function () {
  const { element, data } = Report;
  const runs = data.runs.length > 1 ? Report.shownRuns() : data.runs;
  const parts = [];
  if (data.kind === "comparison" && runs.length === 2) {
    const changed = Report.diff.lines(runs[0].recipe, runs[1].recipe);
    parts.push(element("h3", { text: `What differs in the recipes: ${runs[0].name} (struck out), ${runs[1].name}` }), element("pre", { tabindex: 0 }, ...changed));
  }
  const columns = runs.map((run) => {
    const { packages, ...rest } = run.environment;
    const facts = Object.entries({ ...rest, ...packages }).map(([name, value]) => [name, Array.isArray(value) ? value.join(", ") || "none" : String(value)]);
    const environment = element("details", {}, element("summary", { text: "environment" }), Report.table(["", ""], facts));
    const summary = element("details", {}, element("summary", { text: "summary" }), element("pre", { tabindex: 0, text: JSON.stringify(run.summary, null, 2) }));
    const recipe = element("details", { open: runs.length === 1 }, element("summary", { text: "recipe, as it was resolved" }), element("pre", { tabindex: 0, text: run.recipe }));
    return element("div", {}, element("h3", { text: run.name }), environment, summary, recipe);
  });
  return [...parts, element("div", { class: "columns" }, ...columns)];
};
