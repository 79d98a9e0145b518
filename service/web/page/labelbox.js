/** A box in which any label can be found, also among thousands. */

import { make } from "./dom.js";

/** Labels that are named where several match. */
const NAMED = 4;

let made = 0;

/**
 * A form with the browser's own list of labels, which the keyboard and screen readers know.
 * @param {string} question
 * @param {string[]} labels
 * @param {(label: string) => void} choose
 * @returns {HTMLFormElement}
 */
export function labelBox(question, labels, choose) {
  made += 1;
  const list = make("datalist", { id: `labels-${made}` }, ...labels.map((value) => make("option", { value })));
  const input = make("input", { type: "text", autocomplete: "off", spellcheck: false, "aria-describedby": `found-${made}` });
  input.setAttribute("list", list.id);
  const message = make("p", { class: "soft", role: "status", id: `found-${made}` });
  const search = () => {
    const found = matching(labels, input.value);
    message.textContent = describe(input.value, found);
    if (found.length !== 1) return;
    input.value = found[0];
    choose(found[0]);
  };
  // A choice from the list comes as one replacement, without Enter.
  input.addEventListener("input", ({ inputType }) => {
    if (inputType === undefined || inputType === "insertReplacementText") search();
  });
  return make(
    "form",
    {
      class: "labelbox",
      on: {
        submit: (event) => {
          event.preventDefault();
          search();
        },
      },
    },
    make("label", {}, make("span", {}, question), " ", input),
    list,
    make("button", { type: "submit" }, "Ask"),
    message,
  );
}

/** The label with this name; or else all that contain the text. @param {string[]} labels @param {string} text */
export function matching(labels, text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return [];
  const exact = labels.filter((label) => label.toLowerCase() === wanted);
  return exact.length ? exact.slice(0, 1) : labels.filter((label) => label.toLowerCase().includes(wanted));
}

function describe(text, found) {
  if (!text.trim() || found.length === 1) return "";
  if (!found.length) return `No label contains “${text.trim()}”.`;
  const others = found.length - NAMED;
  return `Several labels contain it: ${found.slice(0, NAMED).join("; ")}${others > 0 ? ` and ${others} more` : ""}.`;
}
