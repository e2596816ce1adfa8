// Formulae and diagrams. What draws them lies beside this file, and is loaded by pages that have some.
const here = new URL(".", document.currentScript.src);

function loadScript(path) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = new URL(path, here);
    script.onload = resolve;
    script.onerror = reject;
    document.head.append(script);
  });
}

// pymdownx.arithmatex writes \(...\) and \[...\] into elements of the class arithmatex.
async function drawFormulae(places) {
  const sheet = document.createElement("link");
  sheet.rel = "stylesheet";
  sheet.href = new URL("katex/katex.min.css", here);
  document.head.append(sheet);
  await loadScript("katex/katex.min.js");
  for (const place of places) {
    const text = place.textContent.trim();
    katex.render(text.slice(2, -2), place, { displayMode: text.startsWith("\\["), throwOnError: false });
  }
}

// The class is not called mermaid, for which the theme would ask another host for its own copy.
async function drawDiagrams(places) {
  await loadScript("mermaid/mermaid.tiny.js");
  mermaid.initialize({ startOnLoad: false, theme: "neutral" });
  for (const place of places) place.textContent = place.textContent; // Without the <code> around the text.
  await mermaid.run({ nodes: places });
}

const formulae = document.querySelectorAll(".arithmatex");
const diagrams = document.querySelectorAll("pre.diagram");
if (formulae.length) drawFormulae(formulae);
if (diagrams.length) drawDiagrams(diagrams);
