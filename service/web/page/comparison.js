/** The way to the comparison: it is loaded when somebody opens it. */

import { byId, make } from "./dom.js";

/** @typedef {Parameters<typeof import("./compare/compare.js").showComparison>[0]} Shown */

const panel = byId("compare");
/** @type {typeof import("./compare/compare.js") | null} */
let comparison = null;
/** @type {Shown | null} */
let shown = null;

/** A button that opens the comparison. */
export function compareButton() {
  return make("button", { type: "button", class: "compare-open", on: { click: openComparison } }, "Compare …");
}

async function openComparison() {
  comparison ??= await import("./compare/compare.js");
  panel.hidden = false;
  comparison.showComparison(shown);
  panel.scrollIntoView();
  panel.querySelector("h2").focus({ preventScroll: true });
}

/** Keep the comparison as the page is. @param {Shown} now */
export function showComparison(now) {
  shown = now;
  if (!panel.hidden) comparison.showComparison(now);
}
