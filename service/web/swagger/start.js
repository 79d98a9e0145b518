// Relative to this script: its address has the prefix that a proxy may have put in front of ours.
const url = new URL("../../openapi.json", document.currentScript.src).href;
SwaggerUIBundle({ url, dom_id: "#api", deepLinking: true, validatorUrl: null });
