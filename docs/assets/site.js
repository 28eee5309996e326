// What scrolls can be reached with the keyboard, and the search field's dialog has a name.
function makeReachable() {
  for (const box of document.querySelectorAll("pre > code, pre, .md-typeset__scrollwrap, .jp-InputArea-editor, .jp-OutputArea-output"))
    if (box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight) box.tabIndex = 0;
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
}
document.addEventListener("DOMContentLoaded", makeReachable);
window.addEventListener("resize", makeReachable);
