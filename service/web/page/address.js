/** The address of what is shown: model, label and map in the URL's fragment. The photo stays on this computer. */

/**
 * @typedef {object} Finding what an address names; null: nothing in particular
 * @property {string | null} model
 * @property {string | null} version
 * @property {string | null} label
 * @property {string | null} layer by its tensor
 * @property {number | null} map of the layer, counted from 1 as on the page
 */

const KEYS = ["model", "version", "label", "layer", "map"];
/** The article has addresses of its own. */
const ARTICLE = "#learn";

/** @type {Finding} */
let current = read() ?? { model: null, version: null, label: null, layer: null, map: null };
/** The open photo, by which "back" finds it again. */
let photo = null;

/** What an address names; null where it is none of these. @returns {Finding | null} */
export function read(hash = location.hash) {
  const entries = new URLSearchParams(hash.slice(1));
  if (hash.startsWith(ARTICLE) || !KEYS.some((key) => entries.has(key))) return null;
  const [model, version, label, layer] = KEYS.map((key) => entries.get(key) || null);
  const map = Number(entries.get("map"));
  return { model, version, label, layer, map: layer ? (map >= 1 ? Math.floor(map) : 1) : null };
}

/**
 * Have the address name something else.
 * @param {Partial<Finding>} changes
 * @param {{replace?: boolean, photo?: number}} [options] `replace`: "back" does not lead to what was shown before
 */
export function remember(changes, { replace = false, photo: opened = photo } = {}) {
  current = { ...current, ...changes };
  const isSame = opened === photo && fragment() === location.hash;
  photo = opened;
  if (isSame || (replace && location.hash.startsWith(ARTICLE))) return;
  history[replace ? "replaceState" : "pushState"]({ photo }, "", fragment());
}

/** Call a function with what "back" and "forward" lead to. @param {(finding: Finding, photo: number | null) => void} restore */
export function listenForHistory(restore) {
  window.addEventListener("popstate", ({ state }) => {
    const finding = read();
    if (!finding) return;
    current = finding;
    photo = state?.photo ?? photo;
    restore(finding, photo);
  });
}

/** The whole address, for others. */
export function link() {
  return location.href.split("#")[0] + fragment();
}

function fragment() {
  const entries = KEYS.filter((key) => current[key] !== null).map((key) => [key, String(current[key])]);
  return `#${new URLSearchParams(entries)}`;
}
