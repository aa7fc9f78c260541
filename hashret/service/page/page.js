"use strict";

// All that is asked of the service: at most so many neighbours once, of which the sliders show some at once.
const MOST = 200;
const PAGE = 60;

const $ = (id) => document.getElementById(id);
let info = null;
let query = null; // {id} or {file, name, url}
let answer = null; // of the service, for the query
let grouped = false; // whether duplicates are shown
let running = new AbortController();

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The service does not answer: is hashret serve still running?");
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({ detail: response.statusText }));
  if (response.status === 401) $("ask-token").showModal();
  throw new Error(problem.detail);
}

const asJson = (value, method = "POST") => ({
  method,
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(value),
});

function fail(error) {
  if (error.name === "AbortError") return;
  $("error").hidden = false;
  $("error").firstElementChild.textContent = error.message;
}

// Runs one thing at a time: what was under way is given up.
async function run(work) {
  running.abort();
  running = new AbortController();
  const mine = running;
  $("error").hidden = true;
  $("results").setAttribute("aria-busy", "true");
  try {
    await work(mine.signal);
  } catch (error) {
    fail(error);
  } finally {
    if (mine === running) $("results").setAttribute("aria-busy", "false");
  }
}

function say(title, empty = "") {
  $("title").textContent = title;
  $("empty").hidden = !empty;
  $("empty").textContent = empty;
}

// The bits of two codes that differ, as a strip of cells.
function drawBits(canvas, a, b) {
  const bits = a.length * 4;
  canvas.width = Math.max(8, bits / 4);
  const style = getComputedStyle(document.documentElement);
  const context = canvas.getContext("2d");
  const differing = [];
  for (let i = 0; i < bits; i++) {
    const differs = ((parseInt(a[i >> 2], 16) ^ parseInt(b[i >> 2], 16)) >> (3 - (i & 3))) & 1;
    if (differs) differing.push(i);
    context.fillStyle = style.getPropertyValue(differs ? "--bit" : "--bit-off");
    context.fillRect(i % canvas.width, Math.floor(i / canvas.width), 1, 1);
  }
  canvas.title = differing.length ? `Bits that differ: ${differing.join(", ")}` : "No bit differs";
}

const inBits = (distance) => (distance === 1 ? "1 bit" : `${distance} bits`);

function makeCard(item, { note = null, code = null, base = null, against = null } = {}) {
  const card = $("card").content.firstElementChild.cloneNode(true);
  const name = item.path ?? item.paths?.[0] ?? `item ${item.id}`;
  const image = card.querySelector("img");
  image.alt = name.split("/").pop();
  image.onload = () => image.classList.toggle("small", image.naturalWidth < 100);
  image.src = `v1/items/${item.id}/image?size=320`;
  card.dataset.id = item.id;
  card.querySelector(".path").textContent = `\u200e${name}`;
  card.title = [name, item.label && `label ${item.label}`, item.metadata && JSON.stringify(item.metadata)]
    .filter(Boolean).join("\n");
  const line = card.querySelector(".distance");
  line.firstElementChild.textContent = note;
  if (code && base) drawBits(line.querySelector("canvas"), code, base);
  else line.querySelector("canvas").remove();
  line.hidden = note === null;
  const similar = () => { location.hash = `id=${item.id}`; };
  card.querySelector(".picture").onclick = card.querySelector(".similar").onclick = similar;
  const different = card.querySelector(".different");
  if (against === null || info.read_only) different.remove();
  else different.onclick = () => judge(card, against, item.id);
  return card;
}

async function judge(card, a, b) {
  try {
    await ask("v1/verdicts", asJson({ a, b, verdict: "different" }));
    card.classList.add("gone");
    for (const button of card.querySelectorAll("button")) button.disabled = true;
    if (answer) answer.hits = answer.hits.filter((hit) => hit.id !== b);
  } catch (error) {
    fail(error);
  }
}

// The neighbours that the sliders let through.
function show() {
  const k = Number($("k").value);
  const radius = Number($("radius").value);
  $("k-shown").textContent = k;
  $("radius-shown").textContent = `${radius} of ${info.bits} bits`;
  if (!answer) return;
  const within = answer.hits.filter((hit) => hit.distance <= radius);
  const shown = within.slice(0, k);
  $("results").replaceChildren(...shown.map((hit) =>
    makeCard(hit, { note: inBits(hit.distance), code: hit.code, base: answer.code, against: query.id ?? null })));
  const more = within.length < answer.hits.length ? "" : answer.hits.length === MOST ? " or more" : "";
  const near = answer.hits[0] ? `: the nearest is ${answer.hits[0].distance} bits away` : "";
  say(`${shown.length} of ${within.length}${more} neighbours within ${radius} bits`,
    shown.length ? "" : `Nothing within ${radius} bits${near}.`);
}

function showQuery() {
  const there = query !== null;
  $("query").hidden = !there;
  $("hint").hidden = there;
  $("remembered").hidden = true;
  $("clear").disabled = $("remember").disabled = !there;
  $("where-label").hidden = grouped;
  $("add").disabled = !there || query.id !== undefined || info.read_only;
  if (!there) return;
  const image = $("original");
  image.onload = () => image.classList.toggle("small", image.naturalWidth < 100);
  image.src = query.url ?? `v1/items/${query.id}/image?size=480`;
  $("caption").textContent = query.name;
}

function search() {
  return run(async (signal) => {
    showQuery();
    const where = $("where").value.trim();
    let options;
    if (query.id !== undefined) {
      options = asJson({ id: query.id, k: MOST, codes: true, ...(where && { where }) });
    } else {
      const form = new FormData();
      form.append("file", query.file, query.name);
      form.append("k", MOST);
      form.append("codes", "true");
      if (where) form.append("where", where);
      options = { method: "POST", body: form };
    }
    answer = null;
    const found = await (await ask("v1/query", { ...options, signal })).json();
    answer = found;
    $("more").hidden = true;
    show();
  });
}

function browse(cursor = 0, where = $("where").value.trim()) {
  return run(async (signal) => {
    const asked = new URLSearchParams({ limit: PAGE, cursor, ...(where && { where }) });
    const page = await (await ask(`v1/items?${asked}`, { signal })).json();
    const cards = page.items.map((item) => makeCard(item));
    if (cursor) $("results").append(...cards);
    else $("results").replaceChildren(...cards);
    $("more").hidden = page.next === null;
    $("more").onclick = () => browse(page.next, where);
    if (cards.length || cursor) say(where ? "All images that the filter lets through" : "All images");
    else say("", where ? "The filter lets no image through." :
      "The collection is empty: fill it with hashret index SOURCE.");
  });
}

function dupes(radius) {
  return run(async (signal) => {
    say(`Looking for duplicates within ${radius} bits …`);
    const found = await (await ask(`v1/dupes?max_distance=${radius}`, { signal })).json();
    const groups = found.groups.map((group) => {
      const section = document.createElement("section");
      section.className = "group";
      const title = document.createElement("h3");
      title.textContent = group.size === 1 ? "1 image at several paths" : `${group.size} images`;
      const row = document.createElement("div");
      row.append(...group.items.map((item, i) => makeCard(item, i
        ? { note: inBits(group.distances[i]), against: group.items[0].id }
        : { note: "Keep" })));
      section.append(title, row);
      return section;
    });
    $("results").replaceChildren(...groups);
    say(`${groups.length} groups of duplicates within ${radius} bits${found.more ? " and more" : ""}`,
      groups.length ? "" : `No duplicates within ${radius} bits.`);
  });
}

// The address says what is shown, so that "back" goes back.
async function route() {
  const [, kind, value] = location.hash.match(/^#(id|dupes)=(\d+)$/) ?? [];
  const duplicates = kind === "dupes";
  $(duplicates ? "to-dupes" : "to-search").setAttribute("aria-current", "page");
  $(duplicates ? "to-search" : "to-dupes").removeAttribute("aria-current");
  if ($("results").classList.toggle("groups", duplicates) !== grouped && grouped) $("radius").value = info.bits;
  grouped = duplicates;
  $("more").hidden = true;
  if (query?.url && location.hash !== "#file") forgetFile();
  answer = null;
  if (kind === "id") {
    query = { id: Number(value), name: `item ${value}` };
    ask(`v1/items/${value}`).then((response) => response.json()).then((item) => {
      if (query?.id === item.id) $("caption").textContent = item.paths[0] ?? query.name;
    }).catch(() => {});
    await search();
    $("title").focus();
  } else if (location.hash === "#file" && query?.file) {
    await search();
  } else {
    query = null;
    showQuery();
    if (duplicates) {
      $("radius").value = value;
      show();
      await dupes(Number(value));
    } else await browse();
  }
}

function forgetFile() {
  URL.revokeObjectURL(query.url);
  query = null;
}

function take(file) {
  if (!file) return;
  if (query?.url) forgetFile();
  query = { file, name: file.name || "pasted image", url: URL.createObjectURL(file) };
  if (location.hash === "#file") route();
  else location.hash = "file";
}

function move(step) {
  const cards = [...document.querySelectorAll("article")];
  const at = cards.indexOf(document.activeElement.closest?.("article"));
  cards[Math.min(cards.length - 1, Math.max(0, at < 0 ? 0 : at + step))]?.focus();
}

function across() {
  const cards = [...document.querySelectorAll("article")];
  return Math.max(1, cards.filter((card) => card.offsetTop === cards[0].offsetTop).length);
}

$("file").onchange = () => { take($("file").files[0]); $("file").value = ""; };
$("drop").onkeydown = (event) => {
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); $("file").click(); }
};
document.addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
document.addEventListener("dragleave", () => $("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  take([...event.dataTransfer.files][0]);
});
document.addEventListener("paste", (event) => take([...event.clipboardData.files][0]));
$("k").oninput = show;
$("radius").oninput = show;
$("radius").onchange = () => { if (location.hash.startsWith("#dupes=")) location.hash = `dupes=${$("radius").value}`; };
$("controls").onsubmit = (event) => event.preventDefault();
$("where").onchange = () => { if (query) search(); else if (!grouped) browse(); };
$("clear").onclick = () => { location.hash = ""; };
$("remember").onclick = async () => {
  try {
    const body = query.id === undefined ? { method: "POST", body: query.file, headers: { "Content-Type":
      "application/octet-stream" } } : asJson({ id: query.id });
    const picture = await (await ask("v1/reconstruct", body)).blob();
    const image = $("remembered");
    image.onload = () => { image.classList.toggle("small", image.naturalWidth < 100); URL.revokeObjectURL(image.src); };
    image.src = URL.createObjectURL(picture);
    image.hidden = false;
  } catch (error) {
    fail(error);
  }
};
$("add").onclick = async () => {
  try {
    const form = new FormData();
    form.append("file", query.file, query.name);
    const { ids } = await (await ask("v1/items", { method: "POST", body: form })).json();
    await count();
    location.hash = `id=${ids[0]}`;
  } catch (error) {
    fail(error);
  }
};
$("error").lastElementChild.onclick = () => { $("error").hidden = true; };
$("give").onclick = () => { location.href = `./?token=${encodeURIComponent($("token").value)}`; };
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, dialog") || event.ctrlKey || event.metaKey || event.altKey) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const card = event.target.closest("article");
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across(), ArrowUp: -across() };
  if (event.key in steps) { event.preventDefault(); move(steps[event.key]); }
  else if (event.key === "Enter" && card === event.target) card.querySelector(".similar").click();
  else if (event.key === "n" && card) card.querySelector(".different")?.click();
  else if (event.key === "/" && !grouped) { event.preventDefault(); $("where").focus(); }
  else if (event.key === "Escape") location.hash = "";
});
window.addEventListener("hashchange", route);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);

async function count() {
  info = await (await ask("v1/info")).json();
  const many = info.items === 1 ? "1 image" : `${info.items.toLocaleString("en")} images`;
  $("counts").textContent = `${many}, ${info.bits}-bit codes by ${info.model}${info.read_only ? ", read-only" : ""}`;
}

count().then(() => {
  $("radius").max = $("radius").value = info.bits;
  if (location.hash === "#file") history.replaceState(null, "", "#");
  show();
  return route();
}).catch(fail);
