// Answers the requests of page.html without a server: the data and weights that offline.py has written, the
// forward pass of the model, and the part of the API that the page uses. Vectors are Float32Arrays.
"use strict";
async function start() {
const { textContent, dataset } = document.getElementById("data"), text = textContent.replace(/z/g, "!!!!!"); // Ascii85
const data = new DataView(new ArrayBuffer(text.length / 5 * 4));
for (let i = 0, word = 0; i < text.length; i++) {
  const code = text.charCodeAt(i);
  word = (i % 5 ? word * 85 : 0) + (code === 118 ? 60 : code) - 33;
  if (i % 5 === 4) data.setUint32((i - 4) / 5 * 4, word);
}
const unpacked = new Blob([data.buffer.slice(0, dataset.bytes)]).stream().pipeThrough(new DecompressionStream("gzip"));
const raw = await new Response(unpacked).arrayBuffer(), end = 4 + new DataView(raw).getUint32(0, true);
const { model, ids, titles, genres, counts, net } = JSON.parse(new TextDecoder().decode(raw.slice(4, end)));
const { dim, heads, kvHeads, window: reach, layers, norm, placeBuckets, placeWidth } = net;
const size = dim / heads, shared = heads / kvHeads, maxLen = model.reads.max_len;

// ---- weights: rows of int8, each times a scale of its own
function matrix({ rows, width, bytes, at }) { // integers of one or two bytes, low bytes first
  const out = new Float32Array(rows * width), begin = end + at, after = begin + bytes * out.length;
  const low = new Uint8Array(raw, begin, out.length), high = new Int8Array(raw, after - out.length, out.length);
  const scales = new Float32Array(raw.slice(after, after + 4 * rows));
  for (let i = 0; i < out.length; i++)
    out[i] = (bytes === 1 ? high[i] : high[i] * 256 + low[i]) * scales[Math.floor(i / width)];
  return Array.from({ length: rows }, (_, row) => out.subarray(row * width, (row + 1) * width));
}
const table = matrix(net.table), places = net.places && matrix(net.places), ratings = net.ratings && matrix(net.ratings);
for (const layer of layers) for (const [name, given] of Object.entries(layer)) if (given?.rows) layer[name] = matrix(given);

// ---- the forward pass: one token at a time, with a KV cache
const dot = (a, b, from = 0) => { let sum = 0; for (let i = 0; i < b.length; i++) sum += a[from + i] * b[i]; return sum; };
const times = (rows, x) => Float32Array.from(rows, row => dot(row, x));
const scaled = (x, gain) => { const r = 1 / Math.sqrt(dot(x, x) / x.length + 1e-6); return x.map((v, i) => v * r * gain[i]); };
const sigmoid = v => 1 / (1 + Math.exp(-v));
function rotate(x, place) { // RoPE: pairs of channels turn by an angle that grows with the place
  for (let i = 0; i < x.length; i += 2) {
    const angle = place * 10000 ** (-(i % size) / size), cos = Math.cos(angle), sin = Math.sin(angle);
    [x[i], x[i + 1]] = [x[i] * cos - x[i + 1] * sin, x[i] * sin + x[i + 1] * cos];
  }
  return x;
}
function attend(q, keys, values) { // a query (dim) over all keys and values so far
  const out = new Float32Array(heads * size), first = reach ? Math.max(0, keys.length - reach) : 0;
  for (let head = 0; head < heads; head++) {
    const mine = q.subarray(head * size, (head + 1) * size), at = Math.floor(head / shared) * size;
    const weights = keys.slice(first).map(key => dot(key, mine, at) / Math.sqrt(size)), top = Math.max(...weights);
    let sum = 0;
    weights.forEach((weight, i) => {
      const share = Math.exp(weight - top), value = values[first + i];
      sum += share;
      for (let j = 0; j < size; j++) out[head * size + j] += share * value[at + j];
    });
    for (let j = 0; j < size; j++) out[head * size + j] /= sum;
  }
  return out;
}
function residual(x, branch, gate) {
  const open = gate && times(gate, x);
  return x.map((v, i) => v + branch[i] * (open ? sigmoid(open[i]) : 1));
}
function step(token, caches, isLast) { // -> the person after this action; of the others, keys and values suffice
  const { number, code, before } = token, place = caches[0].keys.length;
  const bucket = placeBuckets && Math.min(placeBuckets - 1, Math.floor(Math.fround(Math.log1p(before)) / placeWidth));
  let x = table[number].map((v, i) => Math.sqrt(dim) * (v + (places ? places[bucket][i] : 0) + (ratings ? ratings[code][i] : 0)));
  for (const [l, layer] of layers.entries()) {
    const { keys, values } = caches[l], h = scaled(x, layer.attentionNorm);
    keys.push(rotate(times(layer.wk, h), place));
    values.push(times(layer.wv, h));
    if (!isLast && l === layers.length - 1) return null;
    x = residual(x, times(layer.wo, attend(rotate(times(layer.wq, h), place), keys, values)), layer.attentionGate);
    const y = scaled(x, layer.ffnNorm), up = times(layer.w3, y);
    x = residual(x, times(layer.w2, times(layer.w1, y).map((v, i) => v * sigmoid(v) * up[i])), layer.ffnGate);
  }
  return scaled(x, norm);
}
let read = [], caches = []; // the tokens in the cache; what a new history begins with alike is not read again
function encode(actions) {
  const cut = Math.max(0, actions.length - maxLen);
  const tokens = actions.slice(cut).map((action, i) => ({ ...action, before: places ? cut + i : 0 }));
  const alike = (a, b) => b && a.number === b.number && a.code === b.code && a.before === b.before;
  let same = tokens.findIndex((token, i) => !alike(token, read[i]));
  same = Math.min(same < 0 ? tokens.length : same, tokens.length - 1); // the last one is always read
  if (!caches.length) caches = layers.map(() => ({ keys: [], values: [] }));
  for (const cache of caches) { cache.keys.length = same; cache.values.length = same; }
  read = tokens;
  return tokens.slice(same).map((token, i) => step(token, caches, same + i === tokens.length - 1)).at(-1);
}

// ---- the API
const numbers = new Map(ids.map((id, i) => [id, i + 1])), codes = model.reads.ratings;
const fail = text => { throw new Error(text); };
const number = id => numbers.get(id) ?? fail(`there is no item with the id '${id}'`);
const item = n => ({ id: ids[n - 1], title: titles[n - 1], genres: genres.names[genres.of[n - 1]] ?? "", count: counts[n - 1] });
const action = ({ id, rating }) => ({ number: number(id), code: codes.indexOf(rating) + 1 });
const plain = text => text.normalize("NFKD").replace(/\p{M}|'/gu, "").toLowerCase().replace(/&/g, " and ")
  .match(/[\p{L}\p{N}_]+/gu)?.join(" ").replace(/^(the|an?) (?=.)/, "") ?? "";
const byUse = counts.map((_, i) => i + 1).sort((a, b) => counts[b - 1] - counts[a - 1]); // a stable sort
const texts = titles.map(title => ` ${plain(title)}`);
function search(query, k) { // each word begins a word of the title; titles that begin with the query come first
  const words = plain(query), found = byUse.filter(n => words.split(" ").every(word => texts[n - 1].includes(` ${word}`)));
  const begins = n => texts[n - 1].startsWith(` ${words}`);
  return [...found.filter(begins), ...found.filter(n => !begins(n))].slice(0, k);
}
function allowed({ genres: wanted = [], years, exclude = [], min_count: least = 0, include_seen: seen } = {}, items = []) {
  if (years?.[0] > years?.[1]) fail(`the years ${years.join(":")} are an empty range: the earlier one comes first`);
  const not = new Set(exclude.map(number)), year = n => +(titles[n - 1].match(/\((\d{4})\)\s*$/)?.[1] ?? 0);
  if (!(seen ?? model.includes_seen)) for (const { number: n } of items) not.add(n);
  return byUse.filter(n => !not.has(n) && counts[n - 1] >= least && (!years || years[0] <= year(n) && year(n) <= years[1])
    && (!wanted.length || item(n).genres.split("|").some(genre => wanted.includes(genre))));
}
const best = (some, score, k) => some.map(n => [score(n), n]).sort((a, b) => b[0] - a[0] || a[1] - b[1]).slice(0, k)
  .map(([value, n], i) => ({ place: i + 1, ...item(n), score: value }));
function recommend({ items, k, filters }) {
  const begin = performance.now(), actions = items.map(action), hidden = actions.length && encode(actions);
  const list = best(allowed(filters, actions), n => hidden ? dot(table[n], hidden) : counts[n - 1], k);
  return { items: list, basis: hidden ? "model" : "popular", complete: list.length === k, milliseconds: performance.now() - begin };
}
function why({ items, of }) { // leave one out, exactly
  const actions = items.map(action), last = [...new Set(actions.slice(-Math.min(model.limits.why, maxLen)).map(one => one.number))];
  const rests = last.map(n => [n, actions.filter(one => one.number !== n)]).filter(([, rest]) => rest.length);
  const whole = encode(actions), without = rests.map(([n, rest]) => [n, encode(rest)]);
  return { reasons: of.map(number).map(n => without.map(([gone, hidden]) =>
    ({ ...item(gone), drop: dot(table[n], whole) - dot(table[n], hidden) }))
    .filter(({ drop }) => drop > 0).sort((a, b) => b.drop - a.drop).slice(0, 3)) };
}
function similar(id, k) {
  const one = number(id), length = n => Math.sqrt(dot(table[n], table[n])) || 1;
  return { items: best(byUse.filter(n => n !== one), n => dot(table[n], table[one]) / length(n) / length(one), k) };
}
function answer(path, body) {
  const { pathname, searchParams: given } = new URL(path, "http://offline"), k = +given.get("k");
  if (pathname === "/model") return model;
  if (pathname === "/recommend") return recommend(body);
  if (pathname === "/why") return why(body);
  if (pathname === "/items") return { items: (given.get("ids")?.split(",").map(number) ?? search(given.get("q"), k)).map(item) };
  return similar(decodeURIComponent(pathname.slice("/similar/".length)), k);
}
return answer;
}
const started = start();
globalThis.fetch = async (path, { body, signal } = {}) => {
  const answer = await started;
  signal?.throwIfAborted();
  try { return Response.json(answer(path, body && JSON.parse(body))); }
  catch (error) { return Response.json({ error: error.message }, { status: 400 }); }
};
