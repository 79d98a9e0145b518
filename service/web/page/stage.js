/** The opened photo with the heat map over it. */

import { HEAT, legend } from "./colours.js";
import { byId, make, setStyles } from "./dom.js";
import { PhotoFrame } from "./frame.js";
import { paint } from "./paint.js";

const frame = new PhotoFrame();
const heat = make("canvas", { class: "heat", "aria-hidden": "true", hidden: true });
frame.substitute.after(heat);
byId("stage").append(frame.element);
byId("heat-scale").replaceWith(legend(HEAT, ["little", "much"]));

const opacity = /** @type {HTMLInputElement} */ (byId("opacity"));
opacity.addEventListener("input", fade);
fade();

function fade() {
  setStyles(heat, { opacity: Number(opacity.value) / 100 });
}

/** Show another photo, with nothing over it. @param {import("./gallery.js").Photo} photo */
export function showPhoto(photo) {
  frame.show(photo);
  showHeat(null);
}

/** Lay a heat map over the photo. @param {import("./api.js").Heatmap | null} map */
export function showHeat(map) {
  heat.hidden = map === null;
  if (map) paint(heat, map.values.flat(), map.height, map.width, HEAT);
}

/** Outline what the model saw. @param {import("./api.js").Saw} saw */
export function showSeen(saw) {
  frame.showSeen(saw);
}

/** Mark a receptive field, or none. @param {import("./frame.js").Box | null} box */
export function showField(box) {
  frame.showField(box);
}
