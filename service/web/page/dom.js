/** Elements in one line each. Styles are set as properties, for the page's policy allows no others. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element with properties, attributes and children.
 * @param {string} tag
 * @param {Record<string, any>} [options] `class`, `style` (an object), `data` (an object), `on` (listeners by
 *   event); a property of the element, or else an attribute; null and undefined are left out
 * @param {...(Node | string | number | null | undefined | false)} children
 */
export function make(tag, options = {}, ...children) {
  return furnish(document.createElement(tag), options, children);
}

/** As `make`, in SVG: all else is attributes. */
export function draw(tag, options = {}, ...children) {
  return furnish(document.createElementNS(SVG, tag), options, children);
}

function furnish(element, options, children) {
  for (const [name, value] of Object.entries(options)) {
    if (value === null || value === undefined) continue;
    if (name === "class") element.setAttribute("class", value);
    else if (name === "style") setStyles(element, value);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name === "on")
      for (const [event, heard] of Object.entries(value)) element.addEventListener(event, heard);
    else if (name in element && element.namespaceURI !== SVG) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Set styles, custom properties among them. */
export function setStyles(element, styles) {
  for (const [name, value] of Object.entries(styles)) element.style.setProperty(name, value);
}

/** The one element with this id, which the page is known to have. */
export function byId(id) {
  return /** @type {HTMLElement} */ (document.getElementById(id));
}

/** Say something to whoever listens to the page. */
export function say(text) {
  byId("said").textContent = text;
}

/** @type {Map<string, Promise<void>>} style sheets by address */
const sheets = new Map();

/** Load a style sheet, once. @param {URL} url */
export function loadStyles({ href }) {
  if (!sheets.has(href)) {
    const sheet = make("link", { rel: "stylesheet", href });
    const promise = new Promise((resolve) => {
      sheet.addEventListener("load", () => resolve());
      sheet.addEventListener("error", () => resolve()); // then it is shown without
    });
    sheets.set(href, promise);
    document.head.append(sheet);
  }
  return sheets.get(href);
}
