/** What shows an open photo: loaded by `later.js`. */

export { showAnswer } from "./answer.js";
export { showComparison } from "./comparison.js";
export { look } from "./heat.js";
export { showTable } from "./listing.js";
export { closeLayers, openLayers, prepareLayers, showFeatures, showInput, showMap } from "./layers.js";
export { showSaw } from "./saw.js";
export { showPhoto } from "./stage.js";
