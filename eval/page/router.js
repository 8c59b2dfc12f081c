"use strict";
// The load of the experts as a map of colours: 100% is an even share, blue is less, red is more.

Report.router = { run: null, view: "step", place: 0 };

Report.router.runs = () => Report.shownRuns().filter((run) => run.router);

/** Red, green and blue of a load in percent of an even share; 0 and 200 are the ends of the scale. */
Report.router.color = function (percent, isDark) {
  const middle = isDark ? [38, 44, 52] : [240, 242, 244];
  const end = percent < 100 ? (isDark ? [90, 150, 255] : [31, 95, 194]) : isDark ? [255, 105, 90] : [190, 40, 30];
  const share = Math.min(1, Math.abs(percent - 100) / 100);
  return middle.map((value, part) => Math.round(value + (end[part] - value) * share));
};

Report.router.isDark = () => Report.color("back").match(/\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) < 380;

/** What is drawn: rows x columns of percents, with the names of both. */
Report.router.grid = function () {
  const { router } = Report;
  const { steps, layers, experts, load } = router.run.router;
  const at = (step, layer, expert) => load[(step * layers + layer) * experts + expert];
  if (router.view === "step") {
    const step = Math.min(router.place, steps.length - 1);
    return { rows: layers, columns: experts, value: (row, column) => at(step, row, column), name: (row, column) => `step ${steps[step]}, layer ${row}, expert ${column}`, down: "layers", along: "experts" };
  }
  const layer = Math.min(router.place, layers - 1);
  return { rows: experts, columns: steps.length, value: (row, column) => at(column, layer, row), name: (row, column) => `step ${steps[column]}, layer ${layer}, expert ${row}`, down: "experts", along: "steps" };
};

Report.router.draw = function () {
  const { router, element } = Report;
  const runs = router.runs();
  Report.byId("router").hidden = !runs.length;
  document.querySelector('nav a[href="#router"]').hidden = !runs.length;
  if (!runs.length) return;
  if (!runs.includes(router.run)) {
    router.run = runs.at(-1);
    router.place = router.view === "step" ? router.run.router.steps.length - 1 : 0;
  }
  const { steps, layers } = router.run.router;
  const choose = (key) => (event) => {
    router[key] = key === "run" ? runs[Number(event.target.value)] : event.target.value;
    router.place = router.view === "step" ? router.run.router.steps.length - 1 : 0;
    router.draw();
  };
  const runMenu = element("select", { onchange: choose("run") });
  Report.fillMenu(runMenu, runs.map((run, place) => [place, run.name]));
  runMenu.value = String(runs.indexOf(router.run));
  const viewMenu = element("select", { onchange: choose("view") });
  Report.fillMenu(viewMenu, [["step", "layers and experts at a step"], ["layer", "experts of a layer over the steps"]]);
  viewMenu.value = router.view;
  const most = (router.view === "step" ? steps.length : layers) - 1;
  const output = element("output");
  const slider = element("input", { type: "range", min: 0, max: most, step: 1, value: router.place, oninput: () => { router.place = Number(slider.value); paint(); } });
  Report.byId("router-bar").replaceChildren(
    ...(runs.length > 1 ? [element("label", { text: "run " }, runMenu)] : []),
    element("label", { text: "show " }, viewMenu),
    element("label", { text: router.view === "step" ? "step " : "layer " }, slider, output),
  );
  const canvas = element("canvas", { role: "img", tabindex: 0 });
  const spoken = element("p", { class: "faint", role: "status", text: "Point at a cell, or walk through the cells with the arrow keys." });
  Report.byId("router-map").replaceChildren(canvas, router.scale(), spoken);
  const paint = () => {
    output.textContent = router.view === "step" ? steps[router.place] : router.place;
    router.paint(canvas, router.grid());
  };
  paint();
  router.listen(canvas, spoken);
};

Report.router.paint = function (canvas, grid) {
  const isDark = Report.router.isDark();
  canvas.width = grid.columns;
  canvas.height = grid.rows;
  const context = canvas.getContext("2d");
  const image = context.createImageData(grid.columns, grid.rows);
  let least = Infinity, most = 0;
  for (let row = 0; row < grid.rows; row++) {
    for (let column = 0; column < grid.columns; column++) {
      const percent = grid.value(row, column);
      least = Math.min(least, percent);
      most = Math.max(most, percent);
      const place = 4 * (row * grid.columns + column);
      image.data.set([...Report.router.color(percent, isDark), 255], place);
    }
  }
  context.putImageData(image, 0, 0);
  const width = Math.min(1100, Math.max(260, grid.columns * 34));
  canvas.style.width = `${width}px`;
  canvas.style.height = `${Math.min(420, Math.max(grid.rows * 22, 30))}px`;
  canvas.setAttribute("aria-label", `load of ${grid.rows} ${grid.down} (down) by ${grid.columns} ${grid.along} (along), from ${least}% to ${most}% of an even share`);
};

/** The cell under the mouse, or the one that the arrow keys came to, in words. */
Report.router.listen = function (canvas, spoken) {
  let cell = [0, 0];
  const say = () => {
    const grid = Report.router.grid();
    cell = [Math.max(0, Math.min(grid.rows - 1, cell[0])), Math.max(0, Math.min(grid.columns - 1, cell[1]))];
    spoken.textContent = `${grid.name(...cell)}: ${grid.value(...cell)}% of an even share`;
  };
  canvas.addEventListener("mousemove", (event) => {
    const box = canvas.getBoundingClientRect();
    const grid = Report.router.grid();
    cell = [Math.floor(((event.clientY - box.top) / box.height) * grid.rows), Math.floor(((event.clientX - box.left) / box.width) * grid.columns)];
    say();
  });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    cell = [cell[0] + move[0], cell[1] + move[1]];
    say();
  });
};

Report.router.scale = function () {
  const { element } = Report;
  const canvas = element("canvas", { width: 201, height: 1, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  const isDark = Report.router.isDark();
  for (let percent = 0; percent <= 200; percent++) {
    context.fillStyle = `rgb(${Report.router.color(percent, isDark).join(", ")})`;
    context.fillRect(percent, 0, 1, 1);
  }
  return element("div", { class: "scale" }, element("span", { text: "0% (unused)" }), canvas, element("span", { text: "200% and more; 100% is an even share" }));
};
