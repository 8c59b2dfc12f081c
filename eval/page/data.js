"use strict";
// The data of the page: chunks of JSON, compressed, that are unpacked when they are needed.

Report.data = { title: "", kind: "run", runs: [], samples: [], byPrompt: new Map() };

Report.unpack = async function (text) {
  const bytes = Uint8Array.fromBase64 ? Uint8Array.fromBase64(text) : Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
};

Report.chunk = function (name) {
  const found = document.querySelector(`script[data-chunk="${name}"]`);
  if (!found) throw new Error(`the page lacks its part ${name}`);
  return Report.unpack(found.textContent);
};

Report.load = async function () {
  const { data } = Report;
  const index = await Report.chunk("index");
  Object.assign(data, { title: index.title, kind: index.kind });
  index.runs.forEach((run, number) => data.runs.push({ ...run, number, shown: data.kind !== "pipeline" || number === index.runs.length - 1 }));
  for (const run of data.runs) {
    const names = run.blocks;
    run.blocks = [];
    const rows = await Promise.all(names.map((name) => Report.chunk(`rows-${name}`)));
    rows.forEach((part, place) => Report.addBlock(run, part, () => Report.chunk(`texts-${names[place]}`), () => Report.chunk(`tokens-${names[place]}`)));
  }
};

/** Samples that belong together; their texts and tokens are unpacked by the functions given. */
Report.addBlock = function (run, rows, unpackTexts, unpackTokens) {
  const { data } = Report;
  const block = { rows, texts: null, tokens: null, lower: null, unpackTexts, unpackTokens };
  const { columns, prompts } = rows;
  const value = (name, row) => (Array.isArray(columns[name]) ? columns[name][row] : columns[name]);
  const withTokens = new Set(rows.tokens);
  const sources = rows.sources.map((name) => ({ name, step: name.startsWith("step-") ? Number(name.slice(5)) : null }));
  for (let row = 0; row < rows.count; row++) {
    const prompt = value("prompt", row);
    const source = sources[value("source", row)];
    const sample = {
      run, block, row, prompt,
      id: prompts.id[prompt], head: prompts.head[prompt], answer: prompts.answer[prompt], task: prompts.task[prompt],
      source: source.name, step: source.step, reward: value("reward", row), advantage: value("advantage", row),
      length: value("length", row), finish: value("finish", row), version: value("version", row), mode: value("mode", row),
      hasTokens: withTokens.has(row),
    };
    data.samples.push(sample);
    const same = data.byPrompt.get(sample.id);
    if (same) same.push(sample);
    else data.byPrompt.set(sample.id, [sample]);
  }
  run.blocks.push(block);
};

Report.texts = async (block) => (block.texts ??= await block.unpackTexts());
Report.tokens = async (sample) => (sample.hasTokens ? (sample.block.tokens ??= await sample.block.unpackTokens())[sample.row] : null);

/** What a sample says, once its block's texts are there. */
Report.completion = (sample) => sample.block.texts.completions[sample.row];
Report.promptText = (sample) => sample.block.texts.prompts[sample.prompt];

/** Texts of a block in small letters, for searching: one for each of its samples. */
Report.searchable = async function (block) {
  if (block.lower) return block.lower;
  const texts = await Report.texts(block);
  const prompts = texts.prompts.map((text, place) => `${text}\n${block.rows.prompts.answer[place] ?? ""}\n${block.rows.prompts.id[place]}`.toLowerCase());
  const { prompt } = block.rows.columns;
  block.lower = texts.completions.map((text, row) => `${prompts[Array.isArray(prompt) ? prompt[row] : prompt]}\n${text.toLowerCase()}\n${(texts.episodes[row] ?? "").toLowerCase()}`);
  return block.lower;
};

Report.shownRuns = () => Report.data.runs.filter((run) => run.shown);

/** "eval-after" -> "evaluation after", "step-000012" -> "step 12". */
Report.sourceLabel = (name) => name.replace(/^eval-/, "evaluation ").replace(/^step-0*/, "step ");
