/**
 * What the page needs once a photo is open, with its styles. It is loaded while the page works already: on a slow line a
 * photo can be chosen seconds earlier. Calls wait for it and keep their order.
 */

/** Settled once it is loaded, or is not to be had. */
export const loaded = Promise.all([
  import("./view.js"),
  ...Array.from(document.querySelectorAll("link.later"), apply),
]).then(([view]) => view);

/** Apply a style sheet that the browser has loaded for another medium, so that nothing waited for it. */
function apply(link) {
  const { sheet } = link;
  const arrived = new Promise((resolve, reject) => {
    link.addEventListener("load", resolve);
    link.addEventListener("error", reject);
  });
  link.media = "all";
  return sheet ? null : arrived;
}

let view = null;
loaded.then(
  (module) => (view = module),
  () => {}, // `main.js` says so
);

const later =
  (name) =>
  (...told) =>
    view ? view[name](...told) : loaded.then(() => view[name](...told), () => {});

/** Only once it is loaded, for what it shows changes meanwhile: `main.js` calls it again then. */
export const showAnswer = (...told) => view?.showAnswer(...told);
export const showComparison = (...told) => view?.showComparison(...told);
export const showTable = (...told) => view?.showTable(...told);
export const look = later("look");
export const openLayers = later("openLayers");
export const closeLayers = later("closeLayers");
export const prepareLayers = later("prepareLayers");
export const showFeatures = later("showFeatures");
export const showMap = later("showMap");
export const showInput = later("showInput");
export const showSaw = later("showSaw");
export const showPhoto = later("showPhoto");
