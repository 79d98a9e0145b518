/** The page put together: what is open, and who must know when it changes. */

import { listenForHistory, read, remember } from "./address.js";
import * as api from "./api.js";
import { listenForArticle, showInArticle } from "./article/loader.js";
import { byId, make, say } from "./dom.js";
import { focusOn, showGallery, summary } from "./gallery.js";
import { listen } from "./intake.js";
import { askForKey } from "./key.js";
import { describeKnowledge } from "./knowledge.js";
import {
  closeLayers,
  loaded,
  look,
  openLayers,
  prepareLayers,
  showAnswer,
  showComparison,
  showFeatures,
  showInput,
  showMap,
  showPhoto,
  showSaw,
  showTable,
} from "./later.js";
import { Upload } from "./upload.js";

/** Photos that are asked about at the same time: the others wait here, and not in the service's queue. */
const TOGETHER = 3;
/** Labels that are shown as bars. */
const TOP = 10;

const picker = /** @type {HTMLSelectElement} */ (byId("model"));
/** @type {import("./gallery.js").Photo[]} */
let photos = [];
/** @type {import("./gallery.js").Photo | null} */
let current = null;
/** @type {(api.Model & {default?: boolean})[]} */
let models = [];
/** @type {api.Model | null} */
let model = null;
let contract = null;
/** The label whose heat map was asked for; null: that of the most probable. */
let asked = null;
/** What the address asks for, until a photo has its answer. @type {import("./address.js").Finding | null} */
let wanted = read();
/** Calls off what was asked for another model, and for another photo. */
let ofModel = new AbortController();
let ofPhoto = new AbortController();
let made = 0;

listenForArticle(add);
listen(add, (message) => showFault(message, false), () => model && prepareLayers(model));
picker.addEventListener("change", () => {
  const { name, version } = models[picker.selectedIndex];
  wanted = null;
  if (current) remember({ model: name, version, label: null, layer: null, map: null });
  choose(models[picker.selectedIndex]);
});
byId("retry").addEventListener("click", async () => {
  await start();
  if (byId("fault").hidden) byId("choose").focus(); // the button with the focus is gone
});
byId("remove-all").addEventListener("click", removeAll);
byId("change-key").addEventListener("click", async () => {
  if (await askForKey("The page uses the new key from now on, and asks about your photos again.")) await start();
});
listenForHistory(restore);
loaded.then(refresh, () => showFault("a part of this page could not be loaded; reload the page", false));
await start();

/** Read which models there are; the one that was asked before stays, whatever its version is now. */
async function start() {
  showFault(null);
  try {
    models = await api.models();
  } catch (error) {
    showFault(error.message);
    return;
  }
  if (!models.length) {
    showFault("this service has no models yet");
    return;
  }
  picker.replaceChildren(...models.map(choice));
  picker.selectedIndex = Math.max(
    0,
    find(model ? { model: model.name, version: model.version } : wanted),
  );
  picker.disabled = false;
  showLinked();
  await choose(models[picker.selectedIndex]);
}

/** The place of the model that an address names, in its latest version if that one is gone; or of the default. */
function find(finding) {
  const named = models.filter(({ name }) => name === finding?.model);
  const exact = named.find(({ version }) => version === finding.version);
  return models.indexOf(exact ?? latest(named) ?? latest(models.filter((one) => one.default)));
}

/** @param {api.Model[]} versions of one model */
function latest(versions) {
  return versions.toSorted((one, other) => Number(one.version) - Number(other.version)).at(-1);
}

/** Say what the address leads to, while there is no photo to show it for. */
function showLinked() {
  byId("linked").hidden = !wanted;
  if (!wanted) return;
  const { model: name, label, layer, map } = wanted;
  const isMissing = name !== null && !models.some((one) => one.name === name);
  const what = [layer && `map ${map} of the layer ${layer}`, label && `the label “${label}”`, name && `the model ${name}`];
  byId("linked").textContent =
    `This link shows ${what.filter(Boolean).join(", ")}. The photo stayed with its sender: open it here, or try a sample.` +
    (isMissing ? " This service has no such model." : "");
}

/** Show what "back" or "forward" leads to. @param {import("./address.js").Finding} finding @param {number | null} id of the photo */
function restore(finding, id) {
  wanted = finding;
  const photo = photos.find((one) => one.id === id) ?? current;
  const at = find(finding);
  showLinked();
  if (finding.model && at >= 0 && models[at] !== model) {
    picker.selectedIndex = at;
    current = photo;
    choose(models[at]);
  } else if (photo && photo !== current) open(photo);
  else if (photo?.answer) explain(null);
}

function choice(one) {
  return make("option", {}, nameOf(one));
}

function nameOf(one) {
  const version = models.filter(({ name }) => name === one.name).length > 1 ? ` · ${one.version}` : "";
  return one.name + version + (one.resting ? " (resting)" : "");
}

/** Ask another model, about all photos anew. */
async function choose(chosen) {
  ofModel.abort();
  ofModel = new AbortController();
  model = chosen;
  contract = null;
  byId("knows").textContent = "";
  for (const photo of photos) Object.assign(photo, { answer: null, error: null, asked: null });
  if (current) open(current);
  const answering = classifyAll(photos);
  try {
    const known = await api.contract(chosen);
    if (model === chosen) contract = known;
    if (model === chosen) byId("knows").textContent = describeKnowledge(known);
    refresh();
  } catch {
    // without its contract the answer does not say whether it is calibrated
  }
  await answering;
}

/** Ask about new photos, and show the first of them. @param {(File | URL)[]} sources files, or addresses that the service fetches */
function add(sources) {
  const added = sources.map((source) => {
    made += 1;
    const file = source instanceof File ? source : null;
    const upload = new Upload(file, String(source));
    const url = file ? URL.createObjectURL(file) : "";
    const photo = { id: made, name: file?.name ?? nameIn(source), file, upload, url, answer: null, error: null, asked: null };
    upload.addEventListener("progress", () => photos.includes(photo) && showPhotos());
    return photo;
  });
  if (model) classifyAll(added); // before anything is drawn, so that the photo is on its way meanwhile
  const wasOnSample = document.activeElement?.closest(".samples");
  photos = [...photos, ...added];
  if (models.length) showFault(null);
  turnTo(added[0]);
  if (wasOnSample) focusOn(current); // the samples are hidden now
}

/** What the photo at an address is called. @param {URL} address */
function nameIn({ pathname, host }) {
  return pathname.slice(pathname.lastIndexOf("/") + 1) || host;
}

function remove(photo) {
  const at = photos.indexOf(photo);
  photos = photos.filter((one) => one !== photo);
  photo.upload.cancel();
  URL.revokeObjectURL(photo.url);
  if (photo !== current) refresh();
  else if (photos.length) turnTo(photos[Math.min(at, photos.length - 1)], true);
  else close();
  focusOn(current);
}

function removeAll() {
  for (const photo of photos) {
    photo.upload.cancel();
    URL.revokeObjectURL(photo.url);
  }
  photos = [];
  close();
  byId("choose").focus(); // the button that had the focus is gone
}

/**
 * Open a photo because somebody wants to see it.
 * @param {import("./gallery.js").Photo} photo
 * @param {boolean} [replace] whether "back" leads past the photo before
 */
function turnTo(photo, replace = !current) {
  if (current && !current.error) wanted = null; // it was for the photo before
  if (!wanted) remember({ label: null, layer: null, map: null }, { replace, photo: photo.id });
  open(photo);
}

/** @param {import("./gallery.js").Photo} photo */
function open(photo) {
  ofPhoto.abort();
  ofPhoto = new AbortController();
  current = photo;
  asked = null;
  byId("opened").hidden = false;
  showPhoto(photo);
  showSaw(null);
  byId("heat-text").textContent = "";
  refresh();
  if (photo.answer) explain(null);
  else if (photo.error) closeLayers();
}

function close() {
  ofPhoto.abort();
  current = null;
  byId("opened").hidden = true;
  closeLayers();
  refresh();
}

/** Ask about several photos, a few at a time; the opened one comes first. */
async function classifyAll(waiting) {
  const { signal } = ofModel;
  const line = [...waiting].sort((one, other) => Number(other === current) - Number(one === current));
  const worker = async () => {
    for (let photo = line.shift(); photo && !signal.aborted; photo = line.shift())
      await classify(photo, signal);
  };
  await Promise.all(Array.from({ length: TOGETHER }, worker));
}

async function classify(photo, signal) {
  const told = { answer: null, error: null };
  try {
    told.answer = await api.classify(model, photo.upload, TOP, signal);
  } catch (error) {
    told.error = error;
  }
  if (told.answer && model.resting && !signal.aborted) showLoaded();
  if (signal.aborted || !photos.includes(photo)) return;
  Object.assign(photo, told);
  say(`${photo.name}: ${summary(photo)}`);
  if (photo !== current) return showPhotos();
  if (photo.answer) return explain(null);
  closeLayers();
  return refresh();
}

/** Say which models rest now that one has been loaded; another may have made room for it. */
async function showLoaded() {
  model.resting = false;
  try {
    for (const known of await api.models()) {
      const one = models.find(({ name, version }) => name === known.name && version === known.version);
      if (one) one.resting = Boolean(known.resting);
    }
  } catch {
    // the list says it when it is read the next time
  }
  models.forEach((one, at) => (picker.options[at].textContent = nameOf(one)));
}

/** Ask about the opened photo again; which models there are too, where its own is gone. */
function askAgain() {
  if (current.error.code === "model_not_found") return start();
  current.error = null;
  refresh();
  return classify(current, ofModel.signal);
}

/** Show what speaks for a label, and the layers, of the opened photo. @param {string | null} label null: that of the address, or the most probable */
function explain(label) {
  const best = current.answer.predictions[0]?.label ?? null;
  const finding = label === null ? wanted : null;
  wanted = null;
  const { name, version } = model;
  const isKnown = !contract || contract.labels.includes(finding?.label);
  label ??= isKnown ? (finding?.label ?? null) : null;
  remember({ model: name, version, label: label ?? best }, { replace: !label || finding !== null, photo: current.id });
  ofPhoto.abort();
  ofPhoto = new AbortController();
  asked = label;
  refresh();
  const [photo, asking] = [current, model];
  openLayers(asking, photo);
  if (label ?? best) showFeatures(label ?? best);
  if (finding) showMap(finding.layer, finding.map);
  const known = (saw) => showInput(asking, photo, saw);
  look(asking, photo, label, ofPhoto.signal, known, (prediction) => {
    photo.asked = prediction;
    refresh();
  });
}

function showPhotos() {
  const turn = (photo) => turnTo(photo);
  showGallery(photos, current, { open: turn, remove });
  showTable(photos, model, turn);
}

/** Show the photos and the answer as they now are. */
function refresh() {
  showPhotos();
  showInArticle(model, current);
  if (!current) return;
  const explained = asked ?? current.answer?.predictions[0]?.label ?? null;
  byId("opened").classList.toggle("refused", current.error !== null);
  showAnswer(current, model, contract, explained, { choose: explain, again: askAgain });
  const named = models.map((one) => ({ name: nameOf(one), model: one }));
  showComparison({ photos, models: named, model, photo: current, label: explained, goTo });
}

/** Show what somebody has found, for one of the photos. @param {import("./address.js").Finding} finding @param {import("./gallery.js").Photo} photo */
function goTo(finding, photo) {
  remember(finding, { photo: photo.id });
  restore(finding, photo.id);
}

/** Say what keeps the page from working. @param {string | null} message null: nothing does @param {boolean} [again] whether trying again can help */
function showFault(message, again = true) {
  byId("fault").hidden = message === null;
  byId("retry").hidden = !again;
  if (message) byId("fault-text").textContent = `${message[0].toUpperCase()}${message.slice(1)}`;
}
