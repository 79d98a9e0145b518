/** Which features did it: the maps that add most to a label, as patches of the photo. */

import { contributionsTo, strongestPlace } from "./contribution.js";
import { make } from "./dom.js";
import { mapName } from "./names.js";
import { figure } from "./numbers.js";
import { operand } from "./operands.js";
import { hasPlaces } from "./origin.js";
import { paint } from "./paint.js";
import { cutter, regionOf } from "./patch.js";

/** Maps that are shown. */
export const SHOWN = 5;

/**
 * @typedef {object} Subject what is looked into
 * @property {import("./api.js").Description} description
 * @property {import("./tensors.js").Tensors} tensors
 * @property {import("./gallery.js").Photo} photo
 * @property {import("./api.js").Saw | null} saw null: it is not to be had, and there are no patches
 */
/**
 * @typedef {object} Acts
 * @property {(layer: import("./api.js").Layer, index: number, spot?: {row: number, column: number}) => void} visit
 * @property {(layer: import("./api.js").Layer | null, row?: number, column?: number) => void} point
 */

/**
 * A list of the maps that add most to a label's score; or to it rather than to another one's.
 * @param {Subject} subject
 * @param {Acts} acts
 * @param {string} label
 * @param {string | null} [other]
 * @returns {Promise<Node[] | null>} null where the network does not end in a linear layer, or has no such label
 */
export async function featuresOf(subject, acts, label, other = null) {
  const { description, tensors } = subject;
  const [at, against] = [label, other].map((one) => (one === null ? null : description.labels.indexOf(one)));
  const found = at < 0 || against === -1 ? null : await contributionsTo(description, tensors, at, against);
  if (!found) return null;
  const shown = found.contributions.filter(({ value }) => value > 0).slice(0, SHOWN);
  const cut = subject.saw && (await cutter(subject.photo, subject.saw));
  return [
    make("p", { class: "soft" }, summaryOf(shown, found.score, label, other)),
    make("ol", { class: "features-list" }, ...(await Promise.all(shown.map((one) => feature(subject, acts, one, cut))))),
  ];
}

function summaryOf(shown, score, label, other) {
  if (!shown.length) return other === null ? `Nothing adds to “${label}”.` : `Nothing speaks for “${label}” rather than “${other}”.`;
  const sum = figure(shown.reduce((total, { value }) => total + value, 0), 3);
  const whole = `${sum} together; all maps of this layer add ${figure(score, 3)}`;
  const patches = "A patch is what the strongest place of the map sees.";
  return other === null
    ? `These add most to the score of “${label}”: ${whole}. ${patches}`
    : `These speak most for “${label}” rather than “${other}”: ${whole} to the difference of the scores. ${patches}`;
}

/** @param {Subject} subject @param {Acts} acts @param {import("./contribution.js").Contribution} contribution */
async function feature({ description, tensors, saw }, { visit, point }, contribution, cut) {
  const { layer, index, value } = contribution;
  const hasMap = hasPlaces(layer);
  const name = hasMap ? mapName(layer, index) : `value ${index + 1}`;
  const pictures = [];
  let spot;
  if (hasMap) {
    const [place, map] = await Promise.all([strongestPlace(tensors, contribution), operand(tensors, layer, index)]);
    spot = place;
    const thumb = make("canvas", { class: "pixels", "aria-hidden": "true" });
    paint(thumb, map.values, ...map.size, map.scale);
    pictures.push(thumb);
    if (cut) {
      const region = regionOf(layer, place, description.input);
      const patch = make("canvas", { class: "patch", "aria-hidden": "true", data: region });
      cut(patch, region);
      pictures.unshift(patch);
    }
  }
  const [enter, leave] = [() => spot && saw && point(layer, spot.row, spot.column), () => point(null)];
  return make(
    "li",
    { data: { tensor: layer.tensor, index, value } },
    make(
      "button",
      {
        type: "button",
        class: "feature",
        "aria-label": `${name} of ${layer.name} adds ${figure(value, 3)}. Open it`,
        on: {
          click: () => visit(layer, index, spot),
          pointerenter: enter,
          pointerleave: leave,
          focus: enter,
          blur: leave,
        },
      },
      make("span", { class: "pictures" }, ...pictures),
      make("span", { class: "of" }, name),
      make("strong", {}, `+${figure(value, 3)}`),
    ),
  );
}
