/** The API key of this tab. The page asks for it when the service does, and forgets it with the tab. */

const NAME = "fovea-key";
const VALID_KEY = /^[\x21-\x7e]{1,512}$/;

/** The key where the browser refuses to keep it. */
let unkeptKey = "";
/** @type {Promise<boolean> | null} the open question; requests that need a key meanwhile share it */
let question = null;

/** @returns {string} the key, or nothing */
export function readKey() {
  try {
    return sessionStorage.getItem(NAME) ?? unkeptKey;
  } catch {
    return unkeptKey;
  }
}

/**
 * Ask for a key. @param {string} reason the service's words
 * @returns {Promise<boolean>} whether there is a new key
 */
export function askForKey(reason) {
  question ??= openDialog(reason).finally(() => (question = null));
  return question;
}

function keepKey(key) {
  unkeptKey = key;
  try {
    sessionStorage.setItem(NAME, key);
  } catch {
    // storage is switched off: the key lives as long as the page
  }
}

/** @param {string} reason @returns {Promise<boolean>} */
function openDialog(reason) {
  const dialog = /** @type {HTMLDialogElement} */ (document.getElementById("key"));
  const field = /** @type {HTMLInputElement} */ (document.getElementById("key-value"));
  const why = document.getElementById("key-why");
  const ended = new AbortController();
  const options = { signal: ended.signal };
  why.textContent = readKey() ? reason : "Whoever runs this service gives out the keys.";
  field.value = "";
  return new Promise((resolve) => {
    const end = (hasKey) => {
      ended.abort();
      field.value = "";
      dialog.close();
      resolve(hasKey);
    };
    dialog.querySelector("form").addEventListener(
      "submit",
      (event) => {
        event.preventDefault();
        const key = field.value.trim();
        if (!VALID_KEY.test(key)) {
          why.textContent = "A key has letters, digits and signs without spaces. Is this the whole key?";
          field.focus();
          return;
        }
        keepKey(key);
        end(true);
      },
      options,
    );
    document.getElementById("key-cancel").addEventListener("click", () => end(false), options);
    dialog.addEventListener("cancel", () => end(false), options); // Escape
    dialog.showModal();
  });
}
