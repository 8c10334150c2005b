// The page of `xebec ui`: a map of who talks to whom, and flows as they happen. No library, nothing to build.

const ROWS = 500;
const AGAIN = 2000;
const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 190, HEIGHT = 46, ACROSS = 340, DOWN = 84, MARGIN = 32;

const $ = (id) => document.getElementById(id);
const whole = (end) => (end.namespace ? `${end.namespace}/${end.name}` : end.name);
const key = (end) => `${end.kind}:${whole(end)}`;
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

/** An element with attributes and children; text is always text. */
function make(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "rect", "text", "path", "marker", "defs", "title"].includes(name);
  const element = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) element.setAttribute(attribute, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Gives each line of JSON of an answer to `take`, until it ends. */
async function read(url, take, signal) {
  const answer = await fetch(url, { signal });
  if (!answer.ok) throw Object.assign(new Error((await answer.text()).trim()), { refused: answer.status === 400 });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line) take(JSON.parse(line));
  }
}

function tell(text, bad = false) {
  $("state").textContent = text;
  $("state").classList.toggle("bad", bad);
}

// --- The map ---

const short = (number) =>
  number >= 100 ? Math.round(number).toLocaleString("en") : number >= 0.1 ? number.toFixed(1) : "<0.1";
function took(us) {
  if (us < 1000) return `${us} µs`;
  return us < 1_000_000 ? `${(us / 1000).toFixed(us < 10_000 ? 1 : 0)} ms` : `${(us / 1_000_000).toFixed(1)} s`;
}

/** In which column each end stands: behind all that talk to it, but for circles. */
function columns(edges) {
  const next = new Map();
  for (const { from, to } of edges) for (const end of [from, to]) if (!next.has(key(end))) next.set(key(end), new Set());
  const leads = (one, other, seen = new Set()) =>
    one === other || [...next.get(one)].some((step) => !seen.has(step) && seen.add(step) && leads(step, other, seen));
  for (const { from, to } of edges) if (!leads(key(to), key(from))) next.get(key(from)).add(key(to));
  const column = new Map([...next.keys()].map((end) => [end, 0]));
  for (let changed = true; changed; ) {
    changed = false;
    for (const [from, all] of next) {
      for (const to of all) {
        if (column.get(to) <= column.get(from)) {
          column.set(to, column.get(from) + 1);
          changed = true;
        }
      }
    }
  }
  return column;
}

/** Where each end stands. */
function places(edges) {
  const column = columns(edges);
  const ends = new Map();
  for (const { from, to } of edges) for (const end of [from, to]) ends.set(key(end), end);
  const filled = [];
  for (const name of [...ends.keys()].sort()) (filled[column.get(name)] ??= []).push(name);
  const row = new Map();
  for (const names of filled) names?.forEach((name, at) => row.set(name, at));
  // Each moves near those who talk to it.
  for (const names of filled.slice(1)) {
    if (!names) continue;
    const mean = (name) => {
      const rows = edges.filter((edge) => key(edge.to) === name).map((edge) => row.get(key(edge.from)));
      return rows.length ? rows.reduce((sum, one) => sum + one, 0) / rows.length : row.get(name);
    };
    const order = new Map(names.map((name) => [name, mean(name)]));
    names.sort((one, other) => order.get(one) - order.get(other) || one.localeCompare(other));
    names.forEach((name, at) => row.set(name, at));
  }
  const most = Math.max(1, ...filled.map((names) => names?.length ?? 0));
  const found = new Map();
  filled.forEach((names, across) =>
    names?.forEach((name, at) => {
      const y = MARGIN + (at + (most - names.length) / 2) * DOWN;
      found.set(name, { end: ends.get(name), x: MARGIN + across * ACROSS, y });
    }),
  );
  const size = { width: MARGIN * 2 + (filled.length - 1) * ACROSS + WIDTH, height: MARGIN * 2 + most * DOWN - DOWN + HEIGHT };
  return { found, size };
}

function curve(from, to) {
  const y = [from.y + HEIGHT / 2, to.y + HEIGHT / 2];
  if (from === to) {
    const x = from.x + WIDTH / 2;
    const path = `M${x - 30},${from.y} C${x - 50},${from.y - 34} ${x + 50},${from.y - 34} ${x + 30},${from.y}`;
    return { path, x, y: from.y - 20 };
  }
  if (to.x > from.x) {
    const x = [from.x + WIDTH, to.x - 6];
    const half = (x[1] - x[0]) / 2;
    return { path: `M${x[0]},${y[0]} C${x[0] + half},${y[0]} ${x[1] - half},${y[1]} ${x[1]},${y[1]}`, x: (x[0] + x[1]) / 2, y: (y[0] + y[1]) / 2 };
  }
  // Back, below.
  const x = [from.x + WIDTH / 2, to.x + WIDTH / 2];
  const low = Math.max(from.y, to.y) + HEIGHT + 30;
  return { path: `M${x[0]},${from.y + HEIGHT} C${x[0]},${low} ${x[1]},${low} ${x[1]},${to.y + HEIGHT + 6}`, x: (x[0] + x[1]) / 2, y: low - 8 };
}

function label(edge) {
  if (edge.dropped) return `${edge.dropped.toLocaleString("en")} dropped`;
  const parts = [`${short(edge.rate)}/s`];
  const times = edge.answer ?? edge.handshake;
  if (times) parts.push(took(times[0]));
  if (edge.failed) parts.push(`${edge.failed} failed`);
  return parts.join(" · ");
}

let chosen = null;
let picture = null;

/** What is drawn, by its name: elements stay while they are there, so that a click meets them. */
class Layer {
  constructor(id) {
    this.layer = make("g", { id });
    this.drawn = new Map();
  }

  /** Draws these; each is made once, and then given what changes. */
  show(all, create, update) {
    const gone = new Map(this.drawn);
    for (const [name, one] of all) {
      gone.delete(name);
      if (!this.drawn.has(name)) {
        this.drawn.set(name, create(one, name));
        this.layer.append(this.drawn.get(name));
      }
      update(this.drawn.get(name), one, name);
    }
    for (const [name, element] of gone) {
      element.remove();
      this.drawn.delete(name);
    }
  }
}

const lines = new Layer("lines"), boxes = new Layer("boxes"), labels = new Layer("labels");

function choose(name) {
  chosen = name;
  draw();
}

function set(element, attributes) {
  for (const [attribute, value] of Object.entries(attributes)) {
    if (element.getAttribute(attribute) !== String(value)) element.setAttribute(attribute, value);
  }
}

function begin() {
  const arrow = (id, kind) =>
    make("marker", { id, viewBox: "0 0 8 8", refX: 6, refY: 4, markerWidth: 10, markerHeight: 10, markerUnits: "userSpaceOnUse", orient: "auto" },
      make("path", { d: "M0,0 L8,4 L0,8 Z", class: `arrow ${kind}` }));
  $("map").append(make("defs", {}, arrow("arrow", ""), arrow("bad", "bad")), lines.layer, boxes.layer, labels.layer);
}

function draw() {
  const { found, size } = places(picture.edges);
  const edges = new Map(picture.edges.map((edge) => [`${key(edge.from)} ${key(edge.to)}`, edge]));
  const path = (edge) => curve(found.get(key(edge.from)), found.get(key(edge.to)));
  const classes = (edge, name) => `${edge.dropped ? " dropped" : ""}${name === chosen ? " chosen" : ""}`;
  const ends = (edge) => ({ "data-from": whole(edge.from), "data-to": whole(edge.to) });
  lines.show(edges, (edge, name) => {
    const group = make("g", { tabindex: 0, role: "button", ...ends(edge) },
      make("title", {}, `${whole(edge.from)} to ${whole(edge.to)}`), make("path", { class: "wide" }), make("path", { class: "seen" }));
    group.addEventListener("click", () => choose(name));
    group.addEventListener("keydown", (event) => event.key === "Enter" && choose(name));
    return group;
  }, (group, edge, name) => {
    set(group, { class: `edge${classes(edge, name)}` });
    for (const part of group.querySelectorAll("path")) set(part, { d: path(edge).path });
    set(group.querySelector(".seen"), { "marker-end": `url(#${edge.dropped ? "bad" : "arrow"})` });
  });
  boxes.show(found, ({ end }) => {
    const clip = end.name.length > 24 ? `${end.name.slice(0, 23)}…` : end.name;
    return make("g", { class: `node of-${end.kind}`, "data-name": whole(end) },
      make("title", {}, whole(end)),
      make("rect", { width: WIDTH, height: HEIGHT, rx: 7 }),
      make("text", { x: 12, y: 20 }, clip),
      make("text", { x: 12, y: 36, class: "below" }, end.namespace || end.kind));
  }, (group, { x, y }) => set(group, { transform: `translate(${x} ${y})` }));
  labels.show(edges, (edge, name) => {
    const text = make("text", ends(edge));
    text.addEventListener("click", () => choose(name));
    return text;
  }, (text, edge, name) => {
    const { x, y } = path(edge);
    set(text, { class: `label${classes(edge, name)}`, x, y: y - 5 });
    if (text.textContent !== label(edge)) text.textContent = label(edge);
  });
  set($("map"), size);
  details(edges.get(chosen));
}

let told = null;

function details(edge) {
  const aside = $("details");
  aside.hidden = !edge;
  const text = JSON.stringify(edge ?? null);
  if (!edge || text === told) return;
  told = text;
  const facts = [
    ["Flows", `${edge.begun.toLocaleString("en")} (${short(edge.rate)}/s)`],
    ["Ports", edge.ports.join(", ") || "–"],
    ["Handshake", edge.handshake ? `${took(edge.handshake[0])} median, ${took(edge.handshake[1])} p95` : "–"],
  ];
  if (edge.requests) {
    facts.push(["Requests", `${edge.requests.toLocaleString("en")}, ${edge.failed} failed`]);
    if (edge.answer) facts.push(["Answers", `${took(edge.answer[0])} median, ${took(edge.answer[1])} p95`]);
  }
  facts.push(["Dropped", edge.dropped.toLocaleString("en")]);
  const close = make("button", { type: "button", class: "close", "aria-label": "Close" }, "×");
  close.addEventListener("click", () => choose(null));
  const drops = edge.drops.map((drop) =>
    make("div", { class: "drop" },
      make("div", {}, `${clock(drop.time)} ${drop.reason}: ${drop.what}`),
      make("div", { class: "rule" }, drop.by ? `by ${drop.by}` : "by no policy")));
  aside.replaceChildren(close, make("h3", {}, `${whole(edge.from)} → ${whole(edge.to)}`),
    make("dl", {}, ...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])), ...drops);
}

async function map() {
  for (;;) {
    try {
      await read("/api/map", (now) => {
        if (now.trouble) return tell(now.trouble, true);
        const lost = now.lost ? `, ${now.lost.toLocaleString("en")} flows lost` : "";
        const beyond = now.beyond ? ", not all pairs are on the map" : "";
        tell(`${now.edges.length} pairs${lost}${beyond}`, Boolean(now.lost));
        picture = now;
        draw();
      });
      tell("the connection ended", true);
    } catch (error) {
      tell(error.message, true);
    }
    await pause(AGAIN);
  }
}

// --- The flows ---

const clock = (ns) => {
  const time = new Date(Number(ns) / 1e6);
  const two = (number) => String(number).padStart(2, "0");
  return `${two(time.getHours())}:${two(time.getMinutes())}:${two(time.getSeconds())}.${String(time.getMilliseconds()).padStart(3, "0")}`;
};

let waiting = [];
let held = false;

function row(flow) {
  if (flow.trouble) return make("tr", { class: "lost" }, make("td", { colspan: 7 }, flow.trouble));
  if (flow.lost) return make("tr", { class: "lost" }, make("td", { colspan: 7 }, `${flow.lost.toLocaleString("en")} flows were lost`));
  const kind = { DROPPED: "dropped", AUDIT: "audit" }[flow.verdict] ?? "";
  const summary = make("td", {}, flow.summary);
  if (flow.by) summary.append(" ", make("span", { class: kind === "dropped" ? "by" : "" }, `by ${flow.by}`));
  const cell = (text, name = "") => make("td", { class: name }, text);
  return make("tr", { class: kind }, cell(clock(flow.time), "time"), cell(flow.node), cell(flow.source), cell(flow.destination),
    cell(flow.kind), cell(flow.verdict, "verdict"), summary);
}

function show() {
  if (held || !waiting.length) return;
  const rows = waiting.slice(-ROWS).reverse().map(row);
  waiting = [];
  const body = $("flows");
  body.prepend(...rows);
  while (body.children.length > ROWS) body.lastChild.remove();
}

let reading = null;

async function flows(filter) {
  reading?.abort();
  const own = (reading = new AbortController());
  waiting = [];
  $("flows").replaceChildren();
  $("refused").hidden = true;
  while (!own.signal.aborted) {
    try {
      await read(`/api/flows?${new URLSearchParams({ filter })}`, (flow) => {
        waiting.push(flow);
        if (waiting.length > 2 * ROWS) waiting = waiting.slice(-ROWS);
      }, own.signal);
    } catch (error) {
      if (own.signal.aborted) return;
      if (error.refused) {
        $("refused").textContent = error.message;
        $("refused").hidden = false;
        return;
      }
    }
    await pause(AGAIN);
    if (own === reading) $("flows").replaceChildren();
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  flows($("filter").value);
});
$("pause").addEventListener("click", (event) => {
  held = !held;
  event.target.setAttribute("aria-pressed", held);
  event.target.textContent = held ? "Go on" : "Pause";
});
begin();
setInterval(show, 250);
map();
flows("");
