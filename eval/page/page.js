"use strict";
// Puts the parts together when the page opens.

/** Says on the page that something went wrong; the console has the rest. */
Report.fail = function (error) {
  console.error(error);
  const place = Report.byId("failure");
  place.hidden = false;
  place.textContent = `This page could not show everything: ${error.message}`;
};

/** Switches for the runs, and their colours where there are several. */
Report.drawRuns = function () {
  const { data, element } = Report;
  if (data.runs.length < 2) return;
  Report.byId("runs").replaceChildren(...data.runs.map((run) => {
    const button = element("button", { class: "chip", type: "button", "aria-pressed": String(run.shown) }, element("i", { style: { backgroundColor: Report.color(`series-${(run.number % 8) + 1}`) } }), run.name);
    button.addEventListener("click", () => {
      run.shown = !run.shown;
      button.setAttribute("aria-pressed", String(run.shown));
      Report.redraw();
    });
    return button;
  }));
};

Report.redraw = function () {
  Report.curves.draw();
  Report.router.draw();
  Report.tables.draw();
};

Report.keys = function (event) {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  const { list } = Report;
  const actions = {
    "/": () => Report.byId("search").focus(),
    j: () => list.choose(list.chosen + 1, {}),
    k: () => list.choose(list.chosen - 1, {}),
    u: () => Report.sample.unfold(!Report.sample.unfolded),
    c: () => {
      const kinds = Report.tokenView.KINDS.map(([kind]) => kind);
      return Report.byId("token-kind") && Report.sample.paint(kinds[(kinds.indexOf(Report.sample.kind) + 1) % kinds.length]);
    },
  };
  if (!actions[event.key]) return;
  event.preventDefault();
  Promise.resolve(actions[event.key]()).catch(Report.fail);
};

Report.start = async function () {
  await Report.load();
  const theme = Report.byId("theme");
  theme.addEventListener("change", () => {
    document.documentElement.style.colorScheme = theme.value || "light dark";
    Report.drawRuns();
    Report.redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", Report.redraw);
  Report.drawRuns();
  Report.tables.draw();
  Report.curves.start();
  Report.router.draw();
  document.addEventListener("keydown", Report.keys);
  await Report.list.start();
  Report.live.start();
  document.body.dataset.ready = "yes";
  performance.mark("ready");
};

Report.start().catch(Report.fail);
