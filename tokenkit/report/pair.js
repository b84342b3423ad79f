// The chunk under the pointer or the focus is outlined on the other side too.
for (const chunk of document.querySelectorAll(".chunk")) {
  const partners = chunk.dataset.chunk === "-1" ? []
    : [...document.querySelectorAll(`.chunk[data-chunk="${chunk.dataset.chunk}"]`)].filter((other) => other !== chunk);
  const mark = (on) => () => partners.forEach((other) => other.classList.toggle("partner", on));
  for (const event of ["mouseenter", "focus"]) chunk.addEventListener(event, mark(true));
  for (const event of ["mouseleave", "blur"]) chunk.addEventListener(event, mark(false));
}
