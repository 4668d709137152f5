// What the theme and the widgets leave unsaid to those who cannot see the page.

// Jupyter's sliders carry their label beside them, not in them.
function nameSliders() {
  for (const slider of document.querySelectorAll(".widget-slider")) {
    const label = slider.querySelector(".widget-label")?.textContent.trim();
    if (!label) continue;
    for (const handle of slider.querySelectorAll(".noUi-handle, .ui-slider-handle")) {
      if (handle.getAttribute("aria-label") !== label) handle.setAttribute("aria-label", label);
    }
  }
}

// Inside a button that is named Color mode the icons are named Light, Dark and System Settings.
function unnameIcons() {
  for (const title of document.querySelectorAll("svg.theme-switch > title")) {
    title.parentElement.setAttribute("aria-hidden", "true");
    title.parentElement.removeAttribute("aria-labelledby");
    title.remove();
  }
}

function nameControls() {
  // "Toggle hidden content" hides the words that are there to be read: Show code cell source.
  for (const summary of document.querySelectorAll('summary[aria-label="Toggle hidden content"]')) {
    summary.removeAttribute("aria-label");
  }
  for (const summary of document.querySelectorAll(".has-children > details > summary")) {
    const page = summary.closest(".has-children").querySelector("a").textContent.trim();
    summary.setAttribute("aria-label", `Pages below ${page}`);
  }
  for (const field of document.querySelectorAll(".search-button-field")) field.removeAttribute("aria-label");
  // The references are a list; its items do not say that they are.
  for (const entry of document.querySelectorAll(".citation-list > .citation")) {
    entry.setAttribute("role", "listitem");
  }
}

// A page that was opened from disk may not read its neighbours to quote them below a search's results.
if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}

// The gallery leads to a figure and to the code that drew it.
function unfoldCode() {
  if (!new URLSearchParams(location.search).has("code") || !location.hash) return;
  const figure = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const code = figure?.closest(".cell")?.querySelector("details");
  if (!code) return;
  code.open = true;
  code.scrollIntoView();
}

// What scrolls inside its own box has to be reached by the keyboard, which moves it.
function reachFigures() {
  const watch = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
      else target.removeAttribute("tabindex");
    }
  });
  for (const figure of document.querySelectorAll(".cell_output figure")) watch.observe(figure);
}

// A number and its deviation stay in one line of a recorded table.
function keepTogether() {
  for (const cell of document.querySelectorAll(".cell_output td")) {
    if (!cell.childElementCount) cell.textContent = cell.textContent.replaceAll(" ± ", "\u00a0±\u00a0");
  }
}

// Not sooner: while it loads, the page itself scrolls to the figure.
window.addEventListener("load", () => setTimeout(unfoldCode));

// By now the page's deferred scripts have run, MathJax among them; the sliders come later, when all is loaded.
document.addEventListener("DOMContentLoaded", () => {
  nameControls();
  reachFigures();
  keepTogether();
  const late = () => {
    nameSliders();
    unnameIcons();
  };
  late();
  new MutationObserver(late).observe(document.body, { childList: true, subtree: true });
  // The sliders' script asks MathJax 2 to set the formulas in labels; this page has MathJax 3.
  if (window.MathJax?.typesetPromise && !window.MathJax.Hub) {
    window.MathJax.Hub = { Queue: ([, , element]) => window.MathJax.typesetPromise([element]) };
  }
});
