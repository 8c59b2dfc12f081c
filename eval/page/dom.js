"use strict";
// Everything of the page is below this one name. Text goes into the page as text nodes only, never as HTML.
const Report = {};

Report.byId = (id) => document.getElementById(id);

/** An element. Attributes that begin with "on" are listeners, `style` is a mapping, `text` is text; null ones are left out. */
Report.element = function (tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else if (name === "text") node.textContent = value;
    else if (name === "class") node.className = value;
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
};

/** The options of a menu: [value, label] pairs, or values that are their own label. Keeps what was chosen, if it is still there. */
Report.fillMenu = function (menu, options) {
  const before = menu.value;
  menu.replaceChildren(
    ...options.map((option) => {
      const [value, label] = Array.isArray(option) ? option : [option, option];
      return Report.element("option", { value, text: label });
    }),
  );
  if (options.some((option) => String(Array.isArray(option) ? option[0] : option) === before)) menu.value = before;
};

/** A number for people: four significant digits. */
Report.number = function (value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2).replace(".00e", "e");
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
};

Report.percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)}%`);

Report.seconds = function (value) {
  if (!value) return "0 s";
  if (value < 120) return `${Report.number(Number(value.toPrecision(3)))} s`;
  return value < 7200 ? `${Math.round(value / 60)} min` : `${(value / 3600).toFixed(1)} h`;
};

/** A colour of the style sheet as the canvas understands it. */
Report.color = function (name, opacity = 1) {
  const probe = Report.color.probe ?? (Report.color.probe = document.body.appendChild(Report.element("span", { hidden: true })));
  probe.style.color = `var(--${name})`;
  const found = getComputedStyle(probe).color;
  if (opacity === 1) return found;
  const parts = found.match(/[\d.]+/g);
  return `rgba(${parts[0]}, ${parts[1]}, ${parts[2]}, ${opacity})`;
};

/** Calls of the function that come within `wait` milliseconds are one, the last. */
Report.later = function (call, wait) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...values), wait);
  };
};

Report.table = function (head, rows) {
  const { element } = Report;
  const cell = (tag) => (value) =>
    value instanceof Node ? element(tag, {}, value) : element(tag, { class: typeof value === "number" ? "number" : null, text: typeof value === "number" ? Report.number(value) : String(value ?? "") });
  const body = element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map(cell("td")))));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...head.map(cell("th")))), body);
  return element("div", { class: "scroll" }, table);
};
