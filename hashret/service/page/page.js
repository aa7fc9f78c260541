"use strict";

// A query fetches MAX_HITS hits once; the sliders filter them without another request.
const MAX_HITS = 200;
const PAGE_SIZE = 60;

const $ = (id) => document.getElementById(id);
let info = null;
let query = null; // {id, name} or {file, name, url}
let answer = null; // the response to the query
let showsDuplicates = false;
let currentTask = new AbortController();

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The service does not respond: check that hashret serve is running.");
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({ detail: response.statusText }));
  if (response.status === 401) $("token-dialog").showModal();
  throw new Error(problem.detail);
}

const jsonRequest = (value) => ({
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(value),
});

function showError(error) {
  if (error.name === "AbortError") return;
  $("error").hidden = false;
  $("error").firstElementChild.textContent = error.message;
}

// Runs a task and aborts the one before it.
async function run(task) {
  currentTask.abort();
  currentTask = new AbortController();
  const controller = currentTask;
  $("error").hidden = true;
  $("results").setAttribute("aria-busy", "true");
  try {
    await task(controller.signal);
  } catch (error) {
    showError(error);
  } finally {
    if (controller === currentTask) $("results").setAttribute("aria-busy", "false");
  }
}

function setHeading(title, emptyText = "") {
  $("title").textContent = title;
  $("empty").hidden = !emptyText;
  $("empty").textContent = emptyText;
}

// Draws a cell per bit, coloured where the two codes differ.
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
  canvas.title = differing.length ? `Differing bits: ${differing.join(", ")}` : "Equal codes";
}

const inBits = (distance) => (distance === 1 ? "1 bit" : `${distance} bits`);
const setPixelated = ({ currentTarget: image }) => image.classList.toggle("pixelated", image.naturalWidth < 100);

function makeCard(item, { note = null, code = null, queryCode = null, queryId = null } = {}) {
  const card = $("card").content.firstElementChild.cloneNode(true);
  const name = item.path ?? item.paths?.[0] ?? `item ${item.id}`;
  const image = card.querySelector("img");
  image.alt = name.split("/").pop();
  image.onload = setPixelated;
  image.src = `v1/items/${item.id}/image?size=320`;
  card.dataset.id = item.id;
  card.querySelector(".path").textContent = `\u200e${name}`;
  card.title = [name, item.label && `label ${item.label}`, item.metadata && JSON.stringify(item.metadata)]
    .filter(Boolean).join("\n");
  const line = card.querySelector(".distance");
  line.firstElementChild.textContent = note;
  if (code && queryCode) drawBits(line.querySelector("canvas"), code, queryCode);
  else line.querySelector("canvas").remove();
  line.hidden = note === null;
  const findSimilar = () => { location.hash = `id=${item.id}`; };
  card.querySelector(".picture").onclick = card.querySelector(".similar").onclick = findSimilar;
  const different = card.querySelector(".different");
  if (queryId === null || info.read_only) different.remove();
  else different.onclick = () => markDifferent(card, queryId, item.id);
  return card;
}

async function markDifferent(card, a, b) {
  try {
    await request("v1/verdicts", jsonRequest({ a, b, verdict: "different" }));
    card.classList.add("rejected");
    for (const button of card.querySelectorAll("button")) button.disabled = true;
    if (answer) answer.hits = answer.hits.filter((hit) => hit.id !== b);
  } catch (error) {
    showError(error);
  }
}

// Shows the hits within the limits of the sliders.
function showHits() {
  const k = Number($("k").value);
  const radius = Number($("radius").value);
  $("k-shown").textContent = k;
  $("radius-shown").textContent = `${radius} of ${info.bits} bits`;
  if (!answer) return;
  const within = answer.hits.filter((hit) => hit.distance <= radius);
  const shown = within.slice(0, k);
  $("results").replaceChildren(...shown.map((hit) =>
    makeCard(hit, {
      note: inBits(hit.distance), code: hit.code, queryCode: answer.code, queryId: query.id ?? null,
    })));
  const orMore = within.length === MAX_HITS ? " or more" : "";
  const nearest = answer.hits[0] ? ` The nearest image differs in ${inBits(answer.hits[0].distance)}.` : "";
  setHeading(`${shown.length} of ${within.length}${orMore} images within ${inBits(radius)}`,
    shown.length ? "" : `No image within ${inBits(radius)}.${nearest}`);
}

function showQuery() {
  const hasQuery = query !== null;
  $("query").hidden = !hasQuery;
  $("hint").hidden = hasQuery;
  $("reconstruction").hidden = true;
  $("clear").disabled = $("reconstruct").disabled = !hasQuery;
  $("where-label").hidden = showsDuplicates;
  $("add").disabled = !hasQuery || query.id !== undefined || info.read_only;
  if (!hasQuery) return;
  const image = $("original");
  image.onload = setPixelated;
  image.src = query.url ?? `v1/items/${query.id}/image?size=480`;
  $("caption").textContent = query.name;
}

function search() {
  return run(async (signal) => {
    showQuery();
    const where = $("where").value.trim();
    let options;
    if (query.id !== undefined) {
      options = jsonRequest({ id: query.id, k: MAX_HITS, codes: true, ...(where && { where }) });
    } else {
      const form = new FormData();
      form.append("file", query.file, query.name);
      form.append("k", MAX_HITS);
      form.append("codes", "true");
      if (where) form.append("where", where);
      options = { method: "POST", body: form };
    }
    answer = null;
    const response = await (await request("v1/query", { ...options, signal })).json();
    answer = response;
    $("more").hidden = true;
    showHits();
  });
}

function listItems(cursor = 0, where = $("where").value.trim()) {
  return run(async (signal) => {
    const params = new URLSearchParams({ limit: PAGE_SIZE, cursor, ...(where && { where }) });
    const page = await (await request(`v1/items?${params}`, { signal })).json();
    const cards = page.items.map((item) => makeCard(item));
    if (cursor) $("results").append(...cards);
    else $("results").replaceChildren(...cards);
    $("more").hidden = page.next === null;
    $("more").onclick = () => listItems(page.next, where);
    if (cards.length || cursor) setHeading(where ? "Images that match the filter" : "All images");
    else setHeading("", where ? "No image matches the filter." :
      "The collection is empty: add images with hashret index SOURCE.");
  });
}

function showDuplicates(radius) {
  return run(async (signal) => {
    setHeading(`Searching for near-duplicates within ${inBits(radius)} …`);
    const response = await (await request(`v1/dupes?max_distance=${radius}`, { signal })).json();
    const groups = response.groups.map((group) => {
      const section = document.createElement("section");
      section.className = "group";
      const title = document.createElement("h3");
      title.textContent = group.size === 1 ? "1 image, several paths" : `${group.size} images`;
      const row = document.createElement("div");
      row.append(...group.items.map((item, i) => makeCard(item, i
        ? { note: inBits(group.distances[i]), queryId: group.items[0].id }
        : { note: "Keep" })));
      section.append(title, row);
      return section;
    });
    $("results").replaceChildren(...groups);
    const count = response.more ? `More than ${groups.length}` : groups.length;
    setHeading(`${count} ${groups.length === 1 ? "group" : "groups"} of near-duplicates within ${inBits(radius)}`,
      groups.length ? "" : "Increase the maximum distance to find less similar images.");
  });
}

// The hash of the URL selects the view, so that the back button works.
async function route() {
  const [, view, value] = location.hash.match(/^#(id|dupes)=(\d+)$/) ?? [];
  const duplicates = view === "dupes";
  $(duplicates ? "to-dupes" : "to-search").setAttribute("aria-current", "page");
  $(duplicates ? "to-search" : "to-dupes").removeAttribute("aria-current");
  $("results").classList.toggle("groups", duplicates);
  if (showsDuplicates && !duplicates) $("radius").value = info.bits;
  showsDuplicates = duplicates;
  $("more").hidden = true;
  if (query?.url && location.hash !== "#file") forgetFile();
  answer = null;
  if (view === "id") {
    query = { id: Number(value), name: `item ${value}` };
    request(`v1/items/${value}`).then((response) => response.json()).then((item) => {
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
      showHits();
      await showDuplicates(Number(value));
    } else await listItems();
  }
}

function forgetFile() {
  URL.revokeObjectURL(query.url);
  query = null;
}

function setFile(file) {
  if (!file) return;
  if (query?.url) forgetFile();
  query = { file, name: file.name || "pasted image", url: URL.createObjectURL(file) };
  if (location.hash === "#file") route();
  else location.hash = "file";
}

function moveFocus(step) {
  const cards = [...document.querySelectorAll("article")];
  const index = cards.indexOf(document.activeElement.closest?.("article"));
  cards[Math.min(cards.length - 1, Math.max(0, index < 0 ? 0 : index + step))]?.focus();
}

function countColumns() {
  const cards = [...document.querySelectorAll("article")];
  return Math.max(1, cards.filter((card) => card.offsetTop === cards[0].offsetTop).length);
}

$("file").onchange = () => { setFile($("file").files[0]); $("file").value = ""; };
$("drop").onkeydown = (event) => {
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); $("file").click(); }
};
document.addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("dragover"); });
document.addEventListener("dragleave", () => $("drop").classList.remove("dragover"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("dragover");
  setFile([...event.dataTransfer.files][0]);
});
document.addEventListener("paste", (event) => setFile([...event.clipboardData.files][0]));
$("k").oninput = showHits;
$("radius").oninput = showHits;
$("radius").onchange = () => { if (location.hash.startsWith("#dupes=")) location.hash = `dupes=${$("radius").value}`; };
$("controls").onsubmit = (event) => event.preventDefault();
$("where").onchange = () => { if (query) search(); else if (!showsDuplicates) listItems(); };
$("clear").onclick = () => { location.hash = ""; };
$("reconstruct").onclick = async () => {
  try {
    const body = query.id === undefined ? { method: "POST", body: query.file, headers: { "Content-Type":
      "application/octet-stream" } } : jsonRequest({ id: query.id });
    const picture = await (await request("v1/reconstruct", body)).blob();
    const image = $("reconstruction");
    image.onload = (event) => { setPixelated(event); URL.revokeObjectURL(image.src); };
    image.src = URL.createObjectURL(picture);
    image.hidden = false;
  } catch (error) {
    showError(error);
  }
};
$("add").onclick = async () => {
  try {
    const form = new FormData();
    form.append("file", query.file, query.name);
    const { ids } = await (await request("v1/items", { method: "POST", body: form })).json();
    await loadInfo();
    location.hash = `id=${ids[0]}`;
  } catch (error) {
    showError(error);
  }
};
$("error").lastElementChild.onclick = () => { $("error").hidden = true; };
$("submit-token").onclick = () => { location.href = `./?token=${encodeURIComponent($("token").value)}`; };
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, dialog") || event.ctrlKey || event.metaKey || event.altKey) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const card = event.target.closest("article");
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: countColumns(), ArrowUp: -countColumns() };
  if (event.key in steps) { event.preventDefault(); moveFocus(steps[event.key]); }
  else if (event.key === "Enter" && card === event.target) card.querySelector(".similar").click();
  else if (event.key === "n" && card) card.querySelector(".different")?.click();
  else if (event.key === "/" && !showsDuplicates) { event.preventDefault(); $("where").focus(); }
  else if (event.key === "Escape") location.hash = "";
});
window.addEventListener("hashchange", route);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showHits);

async function loadInfo() {
  info = await (await request("v1/info")).json();
  const images = info.items === 1 ? "1 image" : `${info.items.toLocaleString("en")} images`;
  const readOnly = info.read_only ? ", read-only" : "";
  $("counts").textContent = `${images}, ${info.bits}-bit codes (model: ${info.model})${readOnly}`;
}

loadInfo().then(() => {
  $("radius").max = $("radius").value = info.bits;
  if (location.hash === "#file") history.replaceState(null, "", "#");
  showHits();
  return route();
}).catch(showError);
