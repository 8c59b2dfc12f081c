"use strict";
// Curves, drawn by uPlot: a panel for each kind of metric, a line for each metric of each run that is shown.

Report.curves = { panels: [], extra: [], hidden: new Set() };

// A panel: title, the metrics in it (names or patterns), and whether its axis is logarithmic.
Report.curves.KINDS = [
  { title: "reward", metrics: ["reward/mean", /^reward\/([^/]+)\/mean$/] },
  { title: "pass@1 on held-out problems", metrics: ["eval/pass_at_1"] },
  { title: "loss", metrics: ["train/loss", "train/nll", "validation/loss", "train/mtp_loss"] },
  { title: "accuracy", metrics: ["train/accuracy", "train/mean_token_accuracy", "validation/accuracy"] },
  { title: "completion length (tokens)", metrics: ["completion/length_mean"] },
  { title: "shares: truncated, with signal, clipped", metrics: ["completion/truncated_fraction", "groups/with_signal", "policy/clip_fraction"] },
  { title: "entropy (nats)", metrics: ["policy/entropy", "train/entropy"] },
  { title: "KL of the policy (nats)", metrics: ["policy/kl_ref", "policy/kl_old"] },
  { title: "policy loss", metrics: ["policy/loss"] },
  { title: "sampler/learner gap (nats, logarithmic)", metrics: ["parity/logprob_abs_max", "parity/logprob_abs_mean", "parity/kl_sampler_learner"], log: true },
  { title: "routing agreement", metrics: ["parity/routing_agreement"] },
  { title: "router: MaxVio", metrics: ["router/max_violation", /^router\/(layer_\d+)\/max_violation$/] },
  { title: "router: entropy (nats)", metrics: [/^router\/(layer_\d+)\/entropy$/] },
  { title: "lag (versions)", metrics: ["lag/max", "lag/mean"] },
  { title: "seconds per phase", metrics: [/^time\/(.+)$/] },
  { title: "tokens per second", metrics: ["throughput/tokens_per_second"] },
  { title: "samples per second", metrics: ["throughput/samples_per_second"] },
  { title: "gradient norm", metrics: ["optim/grad_norm", "train/grad_norm"] },
  { title: "learning rate", metrics: ["optim/learning_rate", "train/learning_rate"] },
  { title: "audit: reward and verifier", metrics: ["audit/reward_mean", "audit/verifier_mean"] },
  { title: "mismatch: KL by cause (nats)", metrics: ["mismatch/kl_precision", "mismatch/kl_routing", "mismatch/kl_staleness"] },
  { title: "critic", metrics: ["critic/loss", "critic/explained_variance"] },
];
Report.curves.MOST_LINES = 12;
Report.curves.STEPS = [1, 10, 100, 1000, 10000, 100000, 1000000].flatMap((power) => [power, 2 * power, 5 * power]);

/** Exponential moving average that starts without a bias towards zero; nulls stay nulls. */
Report.curves.smooth = function (values, factor) {
  let sum = 0, weight = 0;
  return values.map((value) => {
    if (value === null || value === undefined) return null;
    sum = factor * sum + (1 - factor) * value;
    weight = factor * weight + (1 - factor);
    return sum / weight;
  });
};

/** The metrics of a kind that some shown run has logged at two steps at least. */
Report.curves.metricsOf = function (kind) {
  const names = new Set(Report.shownRuns().flatMap((run) => Object.keys(run.metrics)));
  const place = (name) => kind.metrics.findIndex((wanted) => (wanted instanceof RegExp ? wanted.test(name) : wanted === name));
  const drawable = (name) => Report.shownRuns().some((run) => (run.metrics[name] ?? []).filter((value) => value !== null && (!kind.log || value > 0)).length > 1);
  const found = [...names].filter((name) => place(name) >= 0 && drawable(name));
  return found.sort((left, right) => place(left) - place(right)).slice(0, Report.curves.MOST_LINES);
};

Report.curves.draw = function () {
  const { curves, element } = Report;
  const place = Report.byId("panels");
  curves.panels.forEach((panel) => panel.plot.destroy());
  const kinds = [...curves.KINDS, ...curves.extra.map((name) => ({ title: name, metrics: [name] }))];
  curves.panels = [];
  place.replaceChildren();
  for (const kind of kinds) {
    const names = curves.metricsOf(kind);
    if (!names.length) continue;
    const figure = element("figure", { class: "panel" }, element("figcaption", { text: kind.title }));
    place.append(figure);
    curves.panels.push(curves.panel(figure, kind, names));
  }
  if (!curves.panels.length) place.append(element("p", { class: "faint", text: "Nothing has been logged twice yet." }));
  curves.fillMore();
};

/** The axis of a panel's values: never of no height, and on a logarithmic one only powers of ten are marked. */
Report.curves.range = (_, least, most) => {
  if (least === null) return [0, 1];
  if (least !== most) return uPlot.rangeNum(least, most, 0.1, true);
  return least === 0 ? [0, 1] : [Math.min(0, 1.25 * least), Math.max(0, 1.25 * least)];
};
Report.curves.powers = function (_plot, _axis, least, most) {
  const [first, last] = [Math.ceil(Math.log10(least)), Math.floor(Math.log10(most))];
  const apart = Math.max(1, Math.ceil((last - first) / 5));
  const powers = [];
  for (let power = first; power <= last; power += apart) powers.push(10 ** power);
  return powers;
};

/** The lines of a panel: a raw one for each metric and run, and over it a smoothed one if asked for. */
Report.curves.lines = function (kind, names) {
  const runs = Report.shownRuns();
  const factor = Number(Report.byId("smoothing").value);
  const axis = Report.byId("x-axis").value;
  const lines = [];
  for (const run of runs) {
    names.forEach((name, place) => {
      const values = run.metrics[name];
      if (!values) return;
      const several = runs.length > 1;
      const line = {
        label: (several ? `${run.name}: ` : "") + Report.curves.shortName(kind, name),
        color: several ? `series-${(run.number % 8) + 1}` : `series-${(place % 8) + 1}`,
        dash: several && place ? [8 / place, 3 + place] : null,
        x: run.metrics[axis],
        y: kind.log ? values.map((value) => (value > 0 ? value : null)) : values,
      };
      if (factor > 0) {
        const smoothed = Report.curves.smooth(kind.log ? line.y.map((value) => (value === null ? null : Math.log(value))) : line.y, factor);
        lines.push({ ...line, faint: true });
        lines.push({ ...line, y: kind.log ? smoothed.map((value) => (value === null ? null : Math.exp(value))) : smoothed });
      } else lines.push(line);
    });
  }
  return lines;
};

Report.curves.shortName = function (kind, name) {
  for (const wanted of kind.metrics) {
    const found = wanted instanceof RegExp ? wanted.exec(name) : null;
    if (found) return found[1].replace("layer_", "layer ");
  }
  return name.replace(/^[^/]+\//, "").replaceAll("_", " ");
};

Report.curves.panel = function (figure, kind, names) {
  const { curves, element } = Report;
  const lines = curves.lines(kind, names);
  const tables = lines.map((line) => [line.x, line.y]);
  const joined = uPlot.join(tables, tables.map(() => [1]));
  const axis = {
    stroke: () => Report.color("faint"), grid: { stroke: () => Report.color("line"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif",
  };
  const options = {
    width: Math.max(260, figure.clientWidth - 20), height: 170, legend: { show: false }, cursor: { sync: { key: "curves", setSeries: false }, points: { size: 6 } },
    scales: { x: { time: false }, y: kind.log ? { distr: 3 } : { range: curves.range } },
    axes: [{ ...axis, size: 26, incrs: Report.byId("x-axis").value === "step" ? curves.STEPS : undefined }, { ...axis, size: 56, ...(kind.log ? { splits: curves.powers, filter: (_, splits) => splits } : {}), values: (_, splits) => splits.map((value) => (value === null ? null : Report.number(value))) }],
    series: [{}, ...lines.map((line) => ({
      stroke: () => Report.color(line.color, line.faint ? 0.25 : 1), width: line.faint ? 1 : 1.6, dash: line.dash ?? undefined, spanGaps: true, points: { show: joined[0].length < 2 },
    }))],
    hooks: { setCursor: [(plot) => showValues(plot.cursor.idx)] },
  };
  const plot = new uPlot(options, joined, figure);
  const keys = lines.map((line, place) => {
    if (line.faint) return null;
    const button = element("button", { type: "button", "aria-pressed": "true" }, element("i", { style: { backgroundColor: Report.color(line.color) } }), element("span", { text: line.label }), element("b"));
    // What was hidden stays hidden when the panels are drawn again.
    const name = `${kind.title}: ${line.label}`;
    const show = (shown) => {
      button.setAttribute("aria-pressed", String(shown));
      plot.setSeries(place + 1, { show: shown });
      if (lines[place - 1]?.faint) plot.setSeries(place, { show: shown });
    };
    if (curves.hidden.has(name)) show(false);
    button.addEventListener("click", () => {
      const shown = curves.hidden.delete(name);
      if (!shown) curves.hidden.add(name);
      show(shown);
    });
    return button;
  });
  figure.append(element("div", { class: "legend" }, ...keys));
  const canvas = plot.root.querySelector("canvas");
  canvas.setAttribute("role", "img");

  const lastOf = (values) => values.findLast((value) => value !== null && value !== undefined);
  function showValues(index) {
    keys.forEach((button, place) => {
      if (!button) return;
      const value = index === null || index === undefined ? lastOf(plot.data[place + 1]) : plot.data[place + 1][index];
      button.querySelector("b").textContent = ` ${Report.number(value)}`;
    });
  }
  showValues(null);
  const spoken = lines.filter((line) => !line.faint).map((line) => `${line.label} from ${Report.number(line.y.find((value) => value !== null))} to ${Report.number(lastOf(line.y))}`);
  canvas.setAttribute("aria-label", `${kind.title}: ${spoken.join("; ")}`);
  return { plot, kind, names, figure };
};

Report.curves.resize = Report.later(() => {
  for (const { plot, figure } of Report.curves.panels) plot.setSize({ width: Math.max(260, figure.clientWidth - 20), height: 170 });
}, 120);

/** The menu of what no panel shows yet. */
Report.curves.fillMore = function () {
  const { curves } = Report;
  const drawn = new Set(curves.panels.flatMap((panel) => panel.names));
  const all = new Set(Report.shownRuns().flatMap((run) => Object.keys(run.metrics)));
  const rest = [...all].filter((name) => !drawn.has(name) && name !== "step" && name !== "seconds").sort();
  Report.fillMenu(Report.byId("more-metrics"), [["", `choose (${rest.length})`], ...rest]);
};

Report.curves.start = function () {
  const slider = Report.byId("smoothing");
  slider.addEventListener("input", () => {
    Report.byId("smoothing-value").textContent = slider.value;
    Report.curves.draw();
  });
  Report.byId("x-axis").addEventListener("change", Report.curves.draw);
  const more = Report.byId("more-metrics");
  more.addEventListener("change", () => {
    if (more.value) Report.curves.extra.push(more.value);
    Report.curves.draw();
    more.value = "";
  });
  addEventListener("resize", Report.curves.resize);
  Report.curves.draw();
};
