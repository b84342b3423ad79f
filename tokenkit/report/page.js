// Tooltips of the aligned text. Without this script each chunk keeps its title attribute.
const tip = document.getElementById("tip");

function show(chunk) {
  const [text, ...lines] = chunk.dataset.tip.split("\n");
  const head = document.createElement("b");
  head.textContent = text;
  tip.replaceChildren(head, ...lines.map((line) => {
    const row = document.createElement("div"), name = document.createElement("span");
    const cut = line.indexOf(": ");
    name.textContent = line.slice(0, cut);
    row.append(name, line.slice(cut + 2));
    return row;
  }));
  tip.hidden = false;
  const box = chunk.getBoundingClientRect();
  const below = box.bottom + 6 + tip.offsetHeight <= innerHeight;
  const rightmost = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = Math.max(8, Math.min(box.left, rightmost)) + "px";
  tip.style.top = scrollY + (below ? box.bottom + 6 : box.top - 6 - tip.offsetHeight) + "px";
}

const hide = () => { tip.hidden = true; };

for (const text of document.querySelectorAll(".aligned")) {
  const chunks = [...text.querySelectorAll(".chunk")];
  chunks.forEach((chunk, index) => {
    chunk.dataset.tip = chunk.title;
    chunk.removeAttribute("title");
    chunk.setAttribute("aria-describedby", "tip");
    chunk.tabIndex = index ? -1 : 0; // one Tab stop per text; the arrow keys move inside it
    chunk.addEventListener("mouseenter", () => show(chunk));
    chunk.addEventListener("mouseleave", hide);
    chunk.addEventListener("focus", () => show(chunk));
    chunk.addEventListener("blur", hide);
  });
  text.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = move && chunks[chunks.indexOf(event.target) + move];
    if (next) {
      event.preventDefault();
      next.focus();
    }
  });
}
addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
