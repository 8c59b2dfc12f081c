"use strict";
// The list of samples: filters, search, order, and rows that exist only while they can be seen.

Report.list = { found: [], chosen: -1, ROW: 46 };

Report.list.ORDERS = {
  "as they came": null,
  "highest reward": (a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity),
  "lowest reward": (a, b) => (a.reward ?? Infinity) - (b.reward ?? Infinity),
  longest: (a, b) => (b.length ?? 0) - (a.length ?? 0),
  shortest: (a, b) => (a.length ?? 0) - (b.length ?? 0),
  "largest advantage": (a, b) => Math.abs(b.advantage ?? 0) - Math.abs(a.advantage ?? 0),
  "last steps": (a, b) => (b.step ?? Infinity) - (a.step ?? Infinity),
};

Report.list.fillFilters = function () {
  const { samples, runs } = Report.data;
  const distinct = (key) => [...new Set(samples.map((sample) => sample[key]).filter((value) => value !== null && value !== undefined))];
  const evaluations = distinct("source").filter((name) => !name.startsWith("step-"));
  Report.fillMenu(Report.byId("filter-run"), [["", "all"], ...runs.map((run) => [run.number, run.name])]);
  Report.byId("filter-run").parentElement.hidden = runs.length < 2;
  Report.fillMenu(Report.byId("filter-source"), [["", "everything"], ["rollouts", "rollouts"], ...evaluations.map((name) => [name, Report.sourceLabel(name)])]);
  Report.fillMenu(Report.byId("filter-task"), [["", "all"], ...distinct("task").sort()]);
  Report.fillMenu(Report.byId("filter-finish"), [["", "any"], ...distinct("finish")]);
  Report.fillMenu(Report.byId("order"), Object.keys(Report.list.ORDERS));
};

/** What the filters ask for, as a function that says yes or no. */
Report.list.wanted = function () {
  const value = (id) => Report.byId(id).value;
  const bound = (id, otherwise) => (value(id) === "" ? otherwise : Number(value(id)));
  const [run, source, task, finish] = ["filter-run", "filter-source", "filter-task", "filter-finish"].map(value);
  const [stepFrom, stepTo] = [bound("step-from", -Infinity), bound("step-to", Infinity)];
  const [rewardFrom, rewardTo] = [bound("reward-from", -Infinity), bound("reward-to", Infinity)];
  const bySteps = stepFrom > -Infinity || stepTo < Infinity;
  const byReward = rewardFrom > -Infinity || rewardTo < Infinity;
  const onlyTokens = Report.byId("only-tokens").checked;
  return (sample) =>
    (run === "" || sample.run.number === Number(run)) &&
    (source === "" || (source === "rollouts" ? sample.step !== null : sample.source === source)) &&
    (task === "" || sample.task === task) &&
    (finish === "" || sample.finish === finish) &&
    (!bySteps || (sample.step !== null && sample.step >= stepFrom && sample.step <= stepTo)) &&
    (!byReward || (sample.reward !== null && sample.reward >= rewardFrom && sample.reward <= rewardTo)) &&
    (!onlyTokens || sample.hasTokens);
};

/** Filter, search, sort and show. A search that was overtaken by another one stops. */
Report.list.update = async function () {
  const { list, data } = Report;
  const ticket = (list.ticket = {});
  const before = list.found[list.chosen];
  let found = data.samples.filter(list.wanted());
  const words = Report.byId("search").value.toLowerCase();
  if (words) {
    Report.byId("found").textContent = "searching…";
    const blocks = new Set(found.map((sample) => sample.block));
    for (const block of blocks) {
      await Report.searchable(block);
      if (list.ticket !== ticket) return;
    }
    found = found.filter((sample) => sample.block.lower[sample.row].includes(words));
  }
  const order = list.ORDERS[Report.byId("order").value];
  if (order) found.sort(order);
  list.found = found;
  const embedded = data.samples.length;
  Report.byId("samples").hidden = !embedded;
  document.querySelector('nav a[href="#samples"]').hidden = !embedded;
  const total = data.runs.reduce((sum, run) => sum + run.samples, 0);
  const left = embedded < total ? `; ${Report.number(embedded)} of all ${Report.number(total)} are in this page` : "";
  const mean = found.length ? found.reduce((sum, sample) => sum + (sample.reward ?? 0), 0) / found.length : 0;
  Report.byId("found").textContent = `${Report.number(found.length)} of ${Report.number(embedded)} completions${found.length ? `, mean reward ${Report.number(mean)}` : ""}${left}`;
  list.space.style.height = `${found.length * list.ROW}px`;
  const kept = before ? found.indexOf(before) : -1;
  list.chosen = -1;
  await list.choose(kept >= 0 ? kept : 0, { scroll: kept < 0 });
};

/** Draw the rows that can be seen. */
Report.list.paint = function () {
  const { list, element } = Report;
  const first = Math.max(0, Math.floor(list.box.scrollTop / list.ROW) - 3);
  const last = Math.min(list.found.length, first + Math.ceil(list.box.clientHeight / list.ROW) + 6);
  const rows = [];
  for (let place = first; place < last; place++) {
    const sample = list.found[place];
    const facts = element("div", { class: "facts" },
      element("span", { class: "reward", text: Report.number(sample.reward) }),
      element("span", { text: Report.sourceLabel(sample.source) + (sample.mode ? ` ${sample.mode}` : "") }),
      element("span", { text: sample.length === null || sample.length === undefined ? "" : `${sample.length} tokens` }),
      element("span", { text: Report.data.runs.length > 1 ? sample.run.name : sample.task }));
    const text = element("div", { text: sample.head });
    if (sample.block.texts) text.append(" → ", Report.completion(sample).slice(0, 160));
    rows.push(element("div", {
      class: "row", role: "option", id: `row-${place}`, "aria-selected": String(place === list.chosen), "aria-posinset": place + 1, "aria-setsize": list.found.length,
      style: { top: `${place * list.ROW}px` }, onclick: () => list.choose(place, {}),
    }, facts, text));
  }
  list.space.replaceChildren(...rows);
  const missing = [...new Set(list.found.slice(first, last).map((sample) => sample.block))].filter((block) => !block.texts);
  if (missing.length) Promise.all(missing.map(Report.texts)).then(list.paint, Report.fail);
};

Report.list.choose = async function (place, { scroll = true }) {
  const { list } = Report;
  list.chosen = list.found.length ? Math.max(0, Math.min(list.found.length - 1, place)) : -1;
  if (scroll) {
    const top = list.chosen * list.ROW;
    if (top < list.box.scrollTop) list.box.scrollTop = Math.max(0, top);
    else if (top + list.ROW > list.box.scrollTop + list.box.clientHeight) list.box.scrollTop = top + list.ROW - list.box.clientHeight;
  }
  list.paint();
  if (list.chosen >= 0) list.box.setAttribute("aria-activedescendant", `row-${list.chosen}`);
  else list.box.removeAttribute("aria-activedescendant");
  await Report.sample.show(list.found[list.chosen] ?? null);
};

Report.list.start = function () {
  const { list } = Report;
  list.box = Report.byId("list");
  list.space = list.box.appendChild(Report.element("div", { class: "space" }));
  list.fillFilters();
  list.box.addEventListener("scroll", () => requestAnimationFrame(list.paint), { passive: true });
  list.box.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(list.box.clientHeight / list.ROW) - 1);
    const moves = { ArrowDown: list.chosen + 1, ArrowUp: list.chosen - 1, PageDown: list.chosen + page, PageUp: list.chosen - page, Home: 0, End: list.found.length - 1 };
    if (event.key === "Enter") Report.byId("sample").focus();
    if (!(event.key in moves)) return;
    event.preventDefault();
    list.choose(moves[event.key], {}).catch(Report.fail);
  });
  const filters = Report.byId("filters");
  const update = () => list.update().catch(Report.fail);
  const soon = Report.later(update, 150);
  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.addEventListener("input", (event) => (event.target.type === "search" || event.target.type === "number" ? soon() : update()));
  filters.addEventListener("reset", () => setTimeout(update));
  return list.update();
};
