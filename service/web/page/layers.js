/** The layers of the opened photo: fetches what the network is like, and joins its view, the lens and the detail. */

import { remember } from "./address.js";
import * as api from "./api.js";
import { closeDetail, openDetail } from "./detail.js";
import { byId, make } from "./dom.js";
import { featuresOf } from "./features.js";
import { lookAt, showInputPicture, showLesson, showReceptiveField } from "./lens.js";
import { Minimap } from "./minimap.js";
import { Network } from "./network.js";
import { whole } from "./numbers.js";
import { Tensors } from "./tensors.js";
import { display, orderFor, toolsOf } from "./toolbar.js";

const section = byId("layers");
const text = byId("layers-text");
const tools = byId("layers-tools");
const minimap = byId("minimap");
const features = byId("features");

/** @type {Map<string, Promise<api.Description>>} by model and version */
const descriptions = new Map();
/** What is open. */
let opened = null;
/** What to open once the network is shown. @type {{choose: (layers: api.Layer[]) => api.Layer | undefined, index: number} | null} */
let wish = null;

/**
 * Show the layers for a photo. The service knows the photo already, so its maps can be asked for at once.
 * @param {api.Model} model
 * @param {import("./gallery.js").Photo} photo
 */
export async function openLayers(model, photo) {
  if (opened?.model === model && opened.photo === photo) return;
  closeLayers();
  const calledOff = new AbortController();
  const mine = { model, photo, calledOff, ...pictureOf(photo), ...promised(), network: null, layer: null };
  opened = mine;
  section.hidden = false;
  section.classList.remove("bare");
  lookAt(photo);
  features.hidden = false;
  features.querySelector("div").replaceChildren();
  text.textContent = "Reading the network …";
  try {
    const description = await descriptionOf(model);
    if (opened === mine) show(mine, description);
  } catch (error) {
    if (opened === mine) tellWhy(`The layers cannot be shown: ${error.message}`);
  }
}

/**
 * Let the service read a network whose layers will be shown soon, which takes a second or two the first time.
 * @param {api.Model} model
 */
export function prepareLayers(model) {
  descriptionOf(model).catch(() => {}); // `openLayers` asks again, and says why
}

/**
 * Open a map of a layer: now, or as soon as a photo's network is shown.
 * @param {(layers: api.Layer[]) => api.Layer | undefined} choose
 * @param {number} index of the map, or of the value
 */
export function visit(choose, index) {
  wish = { choose, index };
  opened?.visit?.();
}

/**
 * Show which features speak for a label, as soon as the network and its input are known.
 * @param {string} label
 */
export async function showFeatures(label) {
  const mine = opened;
  if (!mine) return;
  mine.label = label;
  if (mine.network) orderFor(label);
  const place = features.querySelector("div");
  place.setAttribute("aria-busy", "true");
  try {
    const [{ description, tensors, acts }, saw] = await Promise.all([mine.known, mine.saw]);
    const found = await featuresOf({ description, tensors, photo: mine.photo, saw }, acts, label);
    if (opened !== mine || mine.label !== label) return;
    features.hidden = found === null;
    place.replaceChildren(...(found ?? []));
  } catch (error) {
    if (opened !== mine || mine.label !== label || error.name === "AbortError") return;
    place.replaceChildren(make("p", { class: "soft" }, `They cannot be shown: ${error.message}`));
  }
  place.setAttribute("aria-busy", "false");
}

/** Show the map that an address names, or none. @param {string | null} tensor @param {number | null} map counted from 1 */
export function showMap(tensor, map) {
  if (tensor !== null) visit((layers) => layers.find((layer) => layer.tensor === tensor), map - 1);
  else if (opened?.layer) closeMap(opened);
}

/** Take the layers off the page. */
export function closeLayers() {
  opened?.calledOff.abort();
  opened?.network?.close();
  opened = null;
  closeDetail();
  section.hidden = true;
  tools.replaceChildren();
  minimap.replaceChildren();
}

/**
 * Say what the model's exact input is; null where that is not to be had.
 * @param {import("./gallery.js").Photo} photo
 * @param {api.Saw | null} saw
 */
export function showInput(model, photo, saw) {
  if (opened?.model !== model || opened.photo !== photo) return;
  if (saw) showInputPicture(saw);
  opened.see(saw);
  opened.settle(saw ? { body: decoded(saw.png), prepared: true } : { body: photo.file ?? photo.upload, prepared: false });
}

/** What is known of a photo later: the network, and its exact input. */
function promised() {
  let [know, see] = [null, null];
  const known = new Promise((resolve) => (know = resolve));
  const saw = new Promise((resolve) => (see = resolve));
  return { known, saw, know, see };
}

/** What the maps are of: the photo, if the service keeps it; or else the exact input, which is smaller to send. */
function pictureOf(photo) {
  let settle;
  const input = new Promise((resolve) => (settle = resolve));
  const kept = photo.upload.url().catch(() => null);
  return { picture: kept.then((url) => (url ? { body: photo.upload, prepared: false } : input)), settle };
}

function decoded(base64) {
  const bytes = Uint8Array.from(atob(base64), (sign) => sign.charCodeAt(0));
  return new Blob([bytes], { type: "image/png" });
}

/** The network of a model; it is asked for once. @param {api.Model} model @returns {Promise<api.Description>} */
export function descriptionOf(model) {
  const key = `${model.name} ${model.version}`;
  if (!descriptions.has(key)) {
    descriptions.set(key, api.layers(model));
    descriptions.get(key).catch(() => descriptions.delete(key));
  }
  return descriptions.get(key);
}

/** Say why there is nothing to see, in place of an empty network. */
function tellWhy(words) {
  text.textContent = words;
  section.classList.add("bare");
  features.hidden = true;
}

/** @param {api.Description} description */
function show(mine, description) {
  text.textContent = `${whole(description.layers.length)} layers, ${whole(description.parameters)} parameters.`;
  if (description.reason) {
    tellWhy(`${text.textContent} Their maps cannot be shown: ${description.reason}.`);
    return;
  }
  const tensors = new Tensors(mine.model, mine.picture, mine.calledOff.signal);
  const open = (layer, index, spot) => {
    remember({ layer: layer.tensor, map: index + 1 });
    mine.layer = layer;
    showLesson(layer);
    mine.network.mark(layer, index);
    openDetail({
      description,
      layer,
      index,
      tensors,
      spot,
      open,
      visit: visitMap,
      point: showReceptiveField,
      closed: () => leave(mine, layer, index),
    });
  };
  const visitMap = (layer, index, spot) => {
    mine.network.scrollTo(layer);
    open(layer, index, spot);
  };
  const visitFeature = (layer, index, spot) => {
    visitMap(layer, index, spot);
    section.scrollIntoView();
  };
  const point = (layer, row, column, value) => {
    showLesson(layer ?? mine.layer);
    showReceptiveField(layer, row, column, value);
  };
  mine.network = new Network(byId("network"), description, tensors, { open, point }, display);
  mine.know({ description, tensors, acts: { visit: visitFeature, point } });
  tools.replaceChildren(...toolsOf(description, mine.network));
  if (mine.label) orderFor(mine.label);
  minimap.replaceChildren(new Minimap(description.layers, mine.network).element);
  mine.visit = () => {
    const [layer, index] = [wish?.choose(description.layers), wish?.index ?? 0];
    wish = null;
    if (!layer) return;
    visitMap(layer, Math.min(index, layer.shape[0] - 1));
    section.scrollIntoView();
  };
  mine.visit();
}

/** The detail was closed: back to the map that it was of. */
function leave(mine, layer, index) {
  remember({ layer: null, map: null });
  closeMap(mine);
  mine.network.focus(layer, index);
}

function closeMap(mine) {
  closeDetail();
  mine.layer = null;
  showLesson(null);
  mine.network.mark(null);
}
