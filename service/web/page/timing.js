/** Where the milliseconds of an answer went, as one stacked bar. */

import { make } from "./dom.js";
import { milliseconds } from "./numbers.js";

/** Stages in their order, in words. `way` is what the service did not measure: network and browser. */
const STAGES = {
  read: ["read", "the service took in the photo's bytes"],
  queue: ["wait", "waited for a free runner"],
  decode: ["decode", "decoded, oriented and resized"],
  inference: ["model", "the neural network itself"],
  way: ["transfer", "between this page and the service, and what is left"],
};

/** @param {{timing?: Record<string, number>, total: number}} answer milliseconds */
export function timing({ timing: measured = {}, total }) {
  const known = Object.values(measured).reduce((sum, value) => sum + value, 0);
  const parts = { ...measured, way: Math.max(0, total - known) };
  const shown = Object.keys(STAGES).filter((stage) => stage in parts);
  return make(
    "div",
    { class: "timing", data: { total } },
    make("p", { class: "soft" }, `Answered in ${milliseconds(total)}`),
    make(
      "div",
      { class: "stack", "aria-hidden": "true" },
      ...shown.map((stage) =>
        make("span", { class: `stage-${stage}`, style: { "flex-grow": parts[stage] / total } }),
      ),
    ),
    make(
      "ul",
      { class: "legend" },
      ...shown.map((stage) =>
        make(
          "li",
          { title: STAGES[stage][1], data: { stage, value: parts[stage] } },
          make("span", { class: `key stage-${stage}`, "aria-hidden": "true" }),
          `${STAGES[stage][0]} `,
          make("span", { class: "number" }, milliseconds(parts[stage])),
        ),
      ),
    ),
  );
}
