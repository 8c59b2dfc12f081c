"use strict";
// The page of a run that is still going on: every few seconds it asks its server for what is new.

Report.live = { SECONDS: 3, timer: 0 };

/** What the page has already: for each run its last step, that of its router log and of its samples, and how many files of other samples. */
Report.live.seen = function () {
  return Report.data.runs.map((run) => {
    const steps = run.metrics.step ?? [];
    const sources = [...new Set(run.blocks.flatMap((block) => block.rows.sources))];
    const rollouts = sources.filter((name) => name.startsWith("step-")).map((name) => Number(name.slice(5)));
    return [steps.at(-1) ?? 0, run.router?.steps.at(-1) ?? 0, Math.max(0, ...rollouts), run.others];
  });
};

/** Rows are added to columns; a metric that is new begins with nulls. */
Report.live.addColumns = function (columns, added) {
  const before = columns.step?.length ?? 0;
  const count = added.step?.length ?? 0;
  for (const name of new Set([...Object.keys(columns), ...Object.keys(added)])) {
    columns[name] ??= new Array(before).fill(null);
    columns[name].push(...(added[name] ?? new Array(count).fill(null)));
  }
};

Report.live.take = function (news) {
  if (news.reset) {
    location.reload();
    return;
  }
  let isNew = false, hasSamples = false;
  news.runs.forEach((added, place) => {
    const run = Report.data.runs[place];
    const { metrics, router, blocks, ...rest } = added;
    Object.assign(run, rest);
    if (metrics.step?.length) {
      Report.live.addColumns(run.metrics, metrics);
      isNew = true;
    }
    if (router && run.router) {
      run.router.steps.push(...router.steps);
      run.router.load.push(...router.load);
    } else if (router) run.router = router;
    for (const { rows, texts, tokens } of blocks) {
      Report.addBlock(run, rows, async () => texts, async () => tokens);
      hasSamples = true;
    }
  });
  if (isNew) {
    Report.curves.draw();
    Report.router.draw();
    Report.tables.draw();
  }
  if (hasSamples) {
    Report.list.fillFilters();
    Report.list.update().catch(Report.fail);
  }
};

Report.live.ask = async function () {
  const { live } = Report;
  const place = Report.byId("live");
  try {
    const answer = await fetch(`news?seen=${encodeURIComponent(JSON.stringify(live.seen()))}`, { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.status === 403 ? "the server wants its token again: open the address that it printed" : `the server says ${answer.status}`);
    const news = await answer.json();
    live.take(news);
    const last = Report.data.runs.at(-1);
    place.textContent = last?.finished ? "run finished" : `live: step ${last?.steps ?? 0}`;
    live.timer = setTimeout(live.ask, 1000 * live.SECONDS);
  } catch (error) {
    place.textContent = `not live: ${error.message}`;
    live.timer = setTimeout(live.ask, 5000 * live.SECONDS);
  }
};

Report.live.start = function () {
  if (document.body.dataset.live !== "yes") return;
  Report.live.timer = setTimeout(Report.live.ask, 1000 * Report.live.SECONDS);
  fetch("files", { cache: "no-store" }).then((answer) => answer.json()).then(({ files }) => {
    const links = files.map((name) => Report.element("li", {}, Report.element("a", { href: `files/${name.split("/").map(encodeURIComponent).join("/")}`, text: name, download: "" })));
    document.querySelector("#files > div").replaceChildren(Report.element("ul", {}, ...links));
    Report.byId("files").hidden = !files.length;
  }, Report.fail);
};
