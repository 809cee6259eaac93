// The page: files and wishes on the left, what the endpoint makes of them on the right.

import { curlOf } from "./curl.js";
import { BASE, ProblemError, get, hasKey, post, useKey } from "./endpoint.js";
import { drawGlobe } from "./globe.js";
import { readGeotiff, readZip } from "./geotiff.js";
import { Layers } from "./layers.js";
import { MapView, lonlatInWords, lonlatOf } from "./map.js";
import { element } from "./picture.js";

const $ = (id) => document.getElementById(id);

let modalities = new Map(); // name → what the endpoint says of it
let files = []; // {file, name: modality or "", problem}
let aligned = null; // {grid, layers} of the files, as the endpoint reads them
let running = null; // AbortController of what is being asked
let checks = 0; // counts the times that files were sent to be seen
let reading = null; // promise of the files being read, here and by the endpoint
const layers = new Layers();
const view = new MapView($("ground"), $("swipe"), showValues);

start();

async function start() {
  try {
    const [list, info] = await withKey(() => Promise.all([get("v1/modalities"), get("v1/model")]));
    modalities = new Map(list.modalities.map((modality) => [modality.name, modality]));
    layers.amountColors = list.amount_colors;
    const { limits, serving } = info;
    $("model").textContent = `${serving.name}, version ${serving.version}`;
    for (const side of ["width", "height"]) {
      [$(side).min, $(side).max] = [limits.min_side_px, limits.max_side_px];
      $(side).value = Math.min($(side).value, limits.max_side_px);
    }
    $("samples").max = limits.max_samples;
    $("steps").max = limits.max_steps;
    $("generate").disabled = false;
    showFiles();
  } catch (error) {
    $("model").textContent = "";
    showProblem(error);
  }
}

// --- keys --------------------------------------------------------------------------------------

/** Do what asks the endpoint; where it wants a key, ask the person for one and do it again. */
async function withKey(asking) {
  for (;;) {
    try {
      return await asking();
    } catch (error) {
      if (error.problem?.status !== 401) throw error;
      await askForKey(hasKey() ? error.message : "");
    }
  }
}

function askForKey(complaint) {
  $("key-problem").textContent = complaint;
  $("key").value = "";
  $("key-dialog").showModal();
  return new Promise((resolve, reject) => {
    $("key-dialog").onclose = () => {
      const given = $("key").value.trim();
      $("key").value = "";
      useKey(given);
      if (given) resolve();
      else reject(new ProblemError({ detail: "The endpoint asks for an API key.", remedy: "load the page again to give one" }));
    };
  });
}

// --- files -------------------------------------------------------------------------------------

$("files").addEventListener("change", () => {
  addFiles([...$("files").files]);
  $("files").value = "";
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", kind === "dragover");
    if (kind === "drop") addFiles([...event.dataTransfer.files]);
  });
}

function addFiles(given) {
  reading = (async () => {
    try {
      for (const file of given) {
        files.push({ file, name: await guess(file), problem: null });
      }
    } catch (error) { // the browser cannot read it any more
      showProblem(error);
    }
    await lookAtFiles();
  })();
}

/** The modality that a file's own tag, its bands' names or its name tell; "" if none does. */
async function guess(file) {
  const ends = await Promise.all([file.slice(0, 65536), file.slice(-65536)].map((part) => part.text()));
  const metadata = ends.join(""); // GDAL writes it as XML, without compression
  const tagged = metadata.match(/name="MODALITY"[^>]*>(\w+)</)?.[1];
  if (modalities.has(tagged)) return tagged;
  const named = new Set([...metadata.matchAll(/role="description">([^<]+)</g)].map(([, band]) => band));
  const all = [...modalities.values()], has = ({ bands }, name) => bands.some((b) => b.name === name);
  const fitting = all.find(({ bands }) => bands.length === named.size && bands.every((b) => named.has(b.name)))
    ?? (named.size ? all.find((m) => [...named].every((name) => has(m, name))) : undefined); // it lacks a band
  if (fitting) return fitting.name;
  const words = file.name.toLowerCase().split(/[^a-z0-9]+/);
  return [...modalities.keys()].find((name) => words.includes(name)) ?? "";
}

function showFiles() {
  $("cards").replaceChildren(...files.map((entry) => {
    const select = element("select", [new Option("what is it?", ""), ...[...modalities.keys()].map((n) => new Option(n, n))]);
    select.value = entry.name;
    select.ariaLabel = `What ${entry.file.name} shows`;
    select.onchange = () => {
      entry.name = select.value;
      lookAtFiles();
    };
    const remove = element("button", "×");
    remove.type = "button";
    remove.ariaLabel = `Remove ${entry.file.name}`;
    remove.onclick = () => {
      files = files.filter((other) => other !== entry);
      lookAtFiles();
      $("files").focus();
    };
    const problem = entry.problem ? [problemOf(entry.problem)] : [];
    const turn = turnOf(entry);
    const place = turn ? [element("small", `${turn}: each pixel is taken from the first that knows it`)] : [];
    return element("li", [element("span", entry.file.name, "name"), select, remove, ...place, ...problem]);
  }));
  $("nothing").hidden = files.length > 0;
  for (const side of ["width", "height"]) $(side).disabled = files.length > 0; // not validated, then
  showTargets();
  showCurl();
}

/** Of several files of a modality, "2 of 3", as the endpoint's problems say; else "". */
function turnOf(entry) {
  const alike = files.filter(({ name }) => name && name === entry.name);
  return alike.length > 1 ? `${alike.indexOf(entry) + 1} of ${alike.length}` : "";
}

/** Have the endpoint read the files and bring them onto one grid; what it refuses stays listed. */
function lookAtFiles() {
  return (reading = alignFiles());
}

async function alignFiles() {
  const check = ++checks;
  files.forEach((entry) => (entry.problem = null));
  aligned = null;
  showFiles();
  const named = files.filter(({ name }) => name);
  if (!named.length) {
    showLayers();
    return say(files.length ? "Say what each file is." : "");
  }
  say("The endpoint reads the files …");
  try {
    const { bytes } = await withKey(() => post("v1/align", formOf(named, [])));
    if (check !== checks) return;
    const zip = readZip(bytes);
    const manifest = JSON.parse(new TextDecoder().decode(zip.get("manifest.json")));
    aligned = { grid: gridOf(manifest), zip };
    const left = files.length > named.length ? " Say what the others are." : "";
    const lacking = manifest.origin.estimated_bands.map((band) => band.replace(":", " ")).join(", ");
    const estimated = lacking ? ` Estimated from the other bands: ${lacking}.` : "";
    say(`${new Set(named.map(({ name }) => name)).size} observed, ${manifest.width} × ${manifest.height} px.${estimated}${left}`);
  } catch (error) {
    if (check !== checks) return;
    // A problem names the part or layer that it is about; else it is about all of them.
    const guilty = named.find((entry) => {
      const turn = turnOf(entry);
      const called = turn ? `${entry.name} \\(${turn}\\)` : `'?${entry.name}\\b`;
      return new RegExp(`\\b(part|layer) ${called}`).test(error.problem?.detail);
    });
    if (guilty && error.problem) guilty.problem = error.problem;
    else showProblem(error);
    say("The endpoint refused the files.");
  }
  showFiles();
  showLayers();
}

// --- wishes ------------------------------------------------------------------------------------

const unwanted = new Set();

function showTargets() {
  const observed = new Set(files.map(({ name }) => name));
  $("targets").replaceChildren(...[...modalities.values()].map(({ name, title, unit, kind }) => {
    const box = element("input");
    box.type = "checkbox";
    box.disabled = observed.has(name);
    box.checked = !box.disabled && !unwanted.has(name);
    box.onchange = () => {
      unwanted[box.checked ? "delete" : "add"](name);
      showCurl();
    };
    const note = box.disabled ? "observed" : unit === "1" || kind === "categorical" ? title : `${title}, ${unit}`;
    return element("label", [box, element("span", [name, element("small", note)])]);
  }));
}

const wanted = () => [...modalities.keys()].filter((name) => !unwanted.has(name) && !files.some((f) => f.name === name));

function fields() {
  const observed = files.some(({ name }) => name);
  const value = (id) => [id, $(id).value.trim()];
  return [
    ...wanted().map((name) => ["target", name]),
    ...["samples", "seed", "steps"].map(value),
    ...(observed ? [] : ["width", "height"].map(value)),
    ...($("date").value ? [value("date")] : []),
  ];
}

function formOf(named, given) {
  const form = new FormData();
  for (const { name, file } of named) form.append(name, file);
  for (const [name, value] of given) form.append(name, value);
  return form;
}

function showCurl() {
  if (!modalities.size) return;
  const named = files.filter(({ name }) => name).map(({ name, file }) => [name, file.name]);
  const single = wanted().length === 1 && $("samples").value === "1";
  const out = single ? `${wanted()[0]}.tif` : "generated.zip";
  $("curl").textContent = curlOf(`${BASE}v1/generate`, fields(), named, { key: hasKey(), out });
}

$("ask").addEventListener("input", showCurl);
$("other-seed").addEventListener("click", () => {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  showCurl();
  say(`Seed ${$("seed").value}.`);
});
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("curl").textContent);
    say("Copied.");
  } catch { // browsers lend the clipboard to loopback and TLS alone
    getSelection().selectAllChildren($("curl"));
    say("Selected; copy it with your keyboard.");
  }
});

// --- generation --------------------------------------------------------------------------------

$("cancel").addEventListener("click", () => running?.abort());
$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return;
  clearProblem();
  running = new AbortController();
  const began = performance.now();
  const watch = setInterval(() => {
    const seconds = `${((performance.now() - began) / 1000).toFixed(0)} s`;
    $("elapsed").textContent = done ? `${done}, ${seconds}` : seconds;
  }, 250);
  setBusy(true);
  const words = { sending: "Sending the files", computing: "Generating", receiving: "Receiving" };
  let phase = "", done = "";
  const onprogress = (now, share) => {
    if (share === null) $("bar").removeAttribute("value");
    else $("bar").value = share;
    done = share === null ? "" : `${Math.floor(share * 100)} %`;
    if (now !== phase) say(`${words[(phase = now)]} …`);
  };
  try {
    const { signal } = running;
    await filesRead(); // their grid is where the answer is drawn
    signal.throwIfAborted();
    if (!wanted().length) return say("Choose at least one wanted modality.");
    if (files.some(({ name }) => !name)) return say("Say what each file is, or remove it.");
    const given = fields(), grid = aligned?.grid ?? null;
    const answer = await withKey(() => post("v1/generate", formOf(files, given), { signal, onprogress }));
    await take(answer, given, grid);
    say(`Done in ${((performance.now() - began) / 1000).toFixed(1)} s.`);
    if (matchMedia("(max-width: 56rem)").matches) $("frame").scrollIntoView();
  } catch (error) {
    if (error.name === "AbortError") say("Cancelled.");
    else {
      showProblem(error);
      say("Nothing was generated.");
    }
  } finally {
    clearInterval(watch);
    running = null;
    setBusy(false);
  }
});

/** Wait until no file is being read any more; more may come while one waits. */
async function filesRead() {
  for (let awaited = null; awaited !== reading;) await (awaited = reading);
}

function setBusy(busy) {
  $("generate").disabled = busy;
  $("cancel").hidden = $("progress").hidden = !busy;
  $("elapsed").textContent = "";
  if (busy) $("bar").removeAttribute("value");
}

/** Put an answer on the map and on offer. */
async function take({ bytes, header }, given, grid) {
  const downloads = [];
  let made;
  if (header("Content-Type") === "application/zip") {
    const zip = readZip(bytes);
    const manifest = JSON.parse(new TextDecoder().decode(zip.get("manifest.json")));
    made = manifest.files.map(({ name, modality, sample }) => ({ name, modality, sample, bytes: zip.get(name) }));
    grid ??= gridOf({ ...manifest, corners_lonlat: null });
    downloads.push(["all, as a zip", "generated.zip", bytes]);
  } else {
    const { width, height } = await readGeotiff(bytes);
    const [[, modality]] = given; // the one target
    made = [{ name: `${modality}.tif`, modality, sample: 0, bytes }];
    grid ??= gridOf({ crs: "", transform: [1, 0, 0, 0, 1, 0], width, height, corners_lonlat: null });
  }
  downloads.push(...made.map((file) => [file.name, file.name, file.bytes]));
  for (const link of $("downloads").querySelectorAll("a")) URL.revokeObjectURL(link.href);
  $("downloads").replaceChildren(...downloads.map(([text, name, content]) => {
    const link = element("a", text);
    link.href = URL.createObjectURL(new Blob([content]));
    link.download = name;
    return element("li", link);
  }));
  $("provenance").textContent = `${header("X-Model-Name")} version ${header("X-Model-Version")}, seed `
    + `${header("X-Seed")}, steps ${header("X-Steps")}; ${header("X-Conditions") || "nothing known besides"}. `
    + "A sample of what may be there, no observation.";
  $("results").hidden = false;
  layers.generated(made, grid, modalities);
  showLayers(true);
}

// --- sight -------------------------------------------------------------------------------------

for (const side of ["left", "right"]) {
  $(side).addEventListener("change", () => showSide(side));
  $(`${side}-draw`).addEventListener("change", () => showSide(side));
}
for (const button of document.querySelectorAll("[data-zoom]")) {
  button.addEventListener("click", () => (+button.dataset.zoom ? view.zoom(+button.dataset.zoom) : view.fit()));
}

const shown = { left: null, right: null };

/** Offer the layers that there are; begin with an observed one beside a generated one. */
async function showLayers(fresh = false) {
  layers.observed(aligned, modalities);
  const known = [...layers.all.keys()];
  const groups = Map.groupBy(layers.all.values(), ({ group }) => group);
  for (const side of ["left", "right"]) {
    const before = $(side).value;
    $(side).replaceChildren(...[...groups].map(([group, members]) => {
      const options = element("optgroup", members.map(({ id, modality }) => new Option(`${modality.name}, ${group}`, id)));
      options.label = group;
      return options;
    }));
    const kind = side === "left" ? "observed" : "generated";
    const free = known.filter((id) => side === "left" || id !== $("left").value);
    const chosen = free.find((id) => id.startsWith(kind)) ?? free[0] ?? known[0] ?? "";
    $(side).value = known.includes(before) && !fresh ? before : chosen;
  }
  for (const id of ["sides", "swipe", "zoom", "legends"]) $(id).hidden = !known.length;
  $("empty").hidden = known.length > 0;
  await Promise.all([showSide("left"), showSide("right")]);
}

async function showSide(side) {
  const layer = layers.all.get($(side).value);
  const draws = layer?.draws ?? [];
  const draw = $(`${side}-draw`), before = draw.value;
  draw.replaceChildren(...draws.map(([value, text]) => new Option(text, value)));
  draw.value = draws.some(([value]) => value === before) ? before : (draws[0]?.[0] ?? "");
  draw.hidden = draws.length < 2;
  const found = layer ? await layer.look(draw.value) : null;
  if (layer && layers.all.get($(side).value) !== layer) return; // another was chosen meanwhile
  shown[side] = found;
  $(`${side}-title`).textContent = found?.title ?? "";
  $(`${side}-legend`).replaceChildren(...(found?.legend ?? []));
  $(`${side}-values`).textContent = "";
  view.show(shown.left, shown.right);
  if (shown.left && shown.right && shown.left.grid.crs !== shown.right.grid.crs) {
    $("right-legend").append(element("p", "It lies in another reference system than the left one, and is not drawn.", "hint"));
  }
  placeOnEarth();
}

async function placeOnEarth() {
  const grid = view.grid;
  const middle = grid && lonlatOf(grid, grid.height / 2 - 0.5, grid.width / 2 - 0.5);
  $("place").hidden = !middle;
  if (!middle) return;
  $("where").textContent = lonlatInWords(middle, 2);
  $("globe").ariaLabel = `World map with a mark at ${lonlatInWords(middle, 2)}`;
  await drawGlobe($("globe"), middle);
}

function showValues(at) {
  for (const side of ["left", "right"]) {
    const layer = at && shown[side];
    const same = layer && JSON.stringify(layer.grid) === JSON.stringify(at.grid);
    const place = same && lonlatOf(at.grid, at.row, at.col);
    const where = place ? lonlatInWords(place) : at ? `row ${at.row}, column ${at.col}` : "";
    $(`${side}-values`).textContent = same ? `${layer.say(at.row * at.grid.width + at.col)} at ${where}` : "";
  }
}

function gridOf({ crs, transform, width, height, corners_lonlat }) {
  return { crs, transform, width, height, corners_lonlat };
}

// --- words -------------------------------------------------------------------------------------

function say(text) {
  $("status").textContent = text;
}

/** A problem in the endpoint's own words. */
function problemOf({ detail, got, allowed, remedy }) {
  const rows = Object.entries({ got, allowed, "what to do": remedy }).filter(([, text]) => text);
  return element("div", [
    element("strong", detail),
    element("dl", rows.flatMap(([name, text]) => [element("dt", name), element("dd", text)])),
  ], "problem");
}

function showProblem(error) {
  if (!error.problem) console.error(error);
  $("problem").replaceChildren(problemOf(error.problem ?? { detail: String(error.message ?? error) }));
}

function clearProblem() {
  $("problem").replaceChildren();
}
