// The page: panels in their order, those that have nothing to say left out.

const [first, second] = MODELS;
const graph = second || !first?.steps.length ? null : new Graph(first);
const reveal = (node) => graph && graph.reveal(node);
const highlight = (name) => {
  graph.highlight(name);
  graph.element.scrollIntoView({ block: "nearest" });
};

const shownPanels = DATA.comparison
  ? comparisonPanels()
  : second
  ? [...changePanel(first, second, DATA.labels), ...graphPair(MODELS, DATA.labels), ...stagePanel(MODELS)]
  : [
      ...warningPanel(first),
      ...layerPanel(first, reveal),
      ...(graph ? [section("graph", "Graph", "Steps in the order in which they run, by module; arcs are connections that skip rows.", graph.element)] : []),
      ...stagePanel(MODELS),
      ...precisionPanel(first, reveal),
      ...targetPanel(),
      ...groupPanel(first, highlight),
      ...curvePanel(),
      ...tradeoffPanel(first),
      ...sensitivityPanel(),
      ...provenancePanel(MODELS),
    ];

const contents = shownPanels.map((panel) => h("a", { href: `#${panel.id}` }, panel.getAttribute("aria-label")));
const title = DATA.comparison ? comparisonTitle() : titlePanel();
document.getElementById("head").append(...title, h("nav", { "aria-label": "contents" }, contents));
document.getElementById("main").append(...(first ? [cardPanel()] : []), ...shownPanels);
if (graph) graph.layout();
