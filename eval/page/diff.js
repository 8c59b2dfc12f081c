"use strict";
// What two texts have in common and where they differ: Myers' algorithm ("An O(ND) Difference Algorithm", 1986) over words.

Report.diff = { MOST_EDITS: 1500 };

/** Tags, words, blanks and signs; together they are the text. */
Report.diff.words = (text) => text.match(/<\/?\w+>|[\p{L}\p{N}_]+|\s+|[^\p{L}\p{N}_\s]/gu) ?? [];

/**
 * The way from one list to another as [kind, item] with kind " ", "-" or "+".
 * Lists that differ in more than MOST_EDITS places are taken to differ in all between their common beginning and end.
 */
Report.diff.steps = function (left, right) {
  let start = 0;
  while (start < left.length && start < right.length && left[start] === right[start]) start++;
  let end = 0;
  while (end < left.length - start && end < right.length - start && left[left.length - 1 - end] === right[right.length - 1 - end]) end++;
  const kept = (items) => items.map((item) => [" ", item]);
  const middle = Report.diff.middle(left.slice(start, left.length - end), right.slice(start, right.length - end));
  return [...kept(left.slice(0, start)), ...middle, ...kept(left.slice(left.length - end))];
};

Report.diff.middle = function (left, right) {
  const n = left.length, m = right.length;
  const all = () => [...left.map((item) => ["-", item]), ...right.map((item) => ["+", item])];
  if (!n || !m) return all();
  const furthest = new Map([[1, 0]]);
  const history = [];
  for (let edits = 0; edits <= n + m; edits++) {
    if (edits > Report.diff.MOST_EDITS) return all();
    history.push(new Map(furthest));
    for (let k = -edits; k <= edits; k += 2) {
      const down = k === -edits || (k !== edits && (furthest.get(k - 1) ?? -1) < (furthest.get(k + 1) ?? -1));
      let x = down ? furthest.get(k + 1) ?? 0 : furthest.get(k - 1) + 1;
      while (x < n && x - k < m && left[x] === right[x - k]) x++;
      furthest.set(k, x);
      if (x >= n && x - k >= m) return Report.diff.back(left, right, history);
    }
  }
  return all();
};

Report.diff.back = function (left, right, history) {
  const steps = [];
  let x = left.length, y = right.length;
  for (let edits = history.length - 1; edits >= 0; edits--) {
    const furthest = history[edits];
    const k = x - y;
    const down = k === -edits || (k !== edits && (furthest.get(k - 1) ?? -1) < (furthest.get(k + 1) ?? -1));
    const before = down ? k + 1 : k - 1;
    const fromX = edits ? furthest.get(before) ?? 0 : 0;
    const fromY = edits ? fromX - before : 0;
    while (x > fromX && y > fromY) steps.push([" ", left[--x], y--]);
    if (!edits) break;
    if (down) steps.push(["+", right[--y]]);
    else steps.push(["-", left[--x]]);
  }
  return steps.reverse().map(([kind, item]) => [kind, item]);
};

/** Nodes that show the way from one text to the other. */
Report.diff.nodes = function (steps) {
  const nodes = [];
  for (let place = 0; place < steps.length; ) {
    const kind = steps[place][0];
    let text = "";
    while (place < steps.length && steps[place][0] === kind) text += steps[place++][1];
    nodes.push(kind === " " ? document.createTextNode(text) : Report.element(kind === "+" ? "ins" : "del", { text }));
  }
  return nodes;
};

Report.diff.texts = (left, right) => Report.diff.nodes(Report.diff.steps(Report.diff.words(left), Report.diff.words(right)));

/** Only the lines that differ. */
Report.diff.lines = function (left, right) {
  const split = (text) => text.split("\n").map((line) => `${line}\n`);
  const changed = Report.diff.steps(split(left), split(right)).filter(([kind]) => kind !== " ");
  return changed.length ? Report.diff.nodes(changed) : ["nothing"];
};
