/** The way to the table of all photos: it is loaded when somebody opens it. */

import { byId } from "./dom.js";

const toggle = byId("as-table");
/** @type {typeof import("./table/table.js") | null} */
let table = null;
/** What the table shows, or would. @type {Parameters<typeof import("./table/table.js").showTable>} */
let shown = [[], null, () => {}];

toggle.addEventListener("click", async () => {
  table ??= await import("./table/table.js");
  const panel = byId("table");
  panel.hidden = !panel.hidden;
  toggle.setAttribute("aria-expanded", String(!panel.hidden));
  table.showTable(...shown);
});

/**
 * Keep the table as the photos are.
 * @param {Parameters<typeof import("./table/table.js").showTable>} told
 */
export function showTable(...told) {
  shown = told;
  if (told[0].length < 2) {
    byId("table").hidden = true;
    toggle.setAttribute("aria-expanded", "false");
  }
  table?.showTable(...told);
}
