"""The look of the report: one style sheet for light, dark, wide, narrow and paper. Knows class names only."""

CSS = """
:root{color-scheme:light dark;--paper:#fbfaf8;--ink:#1c1b19;--soft:#66625b;--rule:#dcd8d0;--panel:#f3f0ea;
--gguf:#2b6cb0;--onnx:#c05621;--pte:#2f7a4f;--torch:#57534b;
--other:#7c6a9c;--hatch:#a8a297;--cap:#a03352;--track:#ebe7df;
--beaten:#ece8e0}
@media screen and (prefers-color-scheme:dark){:root{--paper:#171614;--ink:#ece8e1;--soft:#a49e93;
--rule:#35322d;--panel:#201e1b;--gguf:#6aa9e9;--onnx:#f0925a;--pte:#74c996;--torch:#b5aea2;
--other:#b7a3dd;--hatch:#6f695f;
--cap:#ef8fa8;--track:#26231f;--beaten:#211f1b}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1160px;margin:0 auto;padding:40px 20px 64px;overflow-wrap:anywhere}
h1{font-size:clamp(1.5rem,4.5vw,2.1rem);line-height:1.2;margin:0 0 6px;letter-spacing:-.015em;
overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:48px 0 12px}
h3{font-size:.95rem;margin:24px 0 8px}
.kicker{margin:0 0 8px;font-size:.8rem;letter-spacing:.09em;text-transform:uppercase;color:var(--onnx);
font-weight:600}
.sub,.note,figcaption{color:var(--soft);font-size:.88rem;overflow-wrap:anywhere}
.sub{margin:0 0 24px}
.note{margin:10px 0 0}
.finding{margin:0 0 4px;overflow-wrap:anywhere}
.cards+.finding,section+.finding{margin-top:28px}
.warning{margin:0 0 20px;padding:10px 14px;border-left:3px solid var(--cap);background:var(--panel)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:16px}
.card{padding:16px 18px 18px;background:var(--panel);border-radius:10px;border-top:4px solid var(--edge);
overflow-wrap:anywhere}
.card.is-gguf{--edge:var(--gguf)}.card.is-onnx{--edge:var(--onnx)}.card.is-pte{--edge:var(--pte)}
.card.is-other{--edge:var(--other)}
.card.none{--edge:var(--hatch)}
.card h3{margin:6px 0;font-size:1.25rem;letter-spacing:-.01em}
.card.none h3{color:var(--soft)}
.device{display:flex;flex-wrap:wrap;gap:2px 12px;justify-content:space-between;margin:0;font-size:.84rem;
font-weight:600}
.device span{color:var(--soft);font-weight:400}
.stands{margin:2px 0 0;color:var(--soft);font-size:.8rem}.stands:empty{display:none}
.why{margin:0;font-size:.92rem;line-height:1.5}
.scroll{overflow-x:auto;margin:12px 0 0}
table{overflow-wrap:normal;border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:9px 6px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap;
vertical-align:top}
thead th{color:var(--soft);font-weight:500;font-size:.8rem;white-space:normal;vertical-align:bottom;
min-width:52px}
th:first-child{text-align:left;position:sticky;left:0;padding-left:0;background:var(--paper);
font-weight:600}
tbody th{max-width:230px;white-space:normal;overflow-wrap:anywhere;min-width:104px}
thead th:first-child{font-weight:500}
small{display:block;color:var(--soft);font-size:.68rem;font-weight:400;line-height:1.3}
td span[title]{text-decoration:underline dotted var(--hatch);text-underline-offset:3px;cursor:help}
tr.published th,tr.published td{color:var(--soft);font-weight:400;
background:repeating-linear-gradient(135deg,var(--panel) 0 6px,var(--paper) 6px 12px)}
tr.failed td{text-align:left;white-space:normal}
tr.failed p{position:sticky;left:124px;width:min(60vw,760px);margin:0;color:var(--cap);overflow-wrap:anywhere}
.fit{width:auto;min-width:50%}.fit th,.fit td{padding-right:22px}.fit .over,.fit .over small{color:var(--cap)}
.badge{display:inline-block;margin-left:8px;padding:0 7px;border:1px solid var(--hatch);border-radius:9px;
font-size:.72rem;font-weight:500;background:var(--paper);white-space:nowrap}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:36px 44px;
margin-top:16px}
figure{margin:0;min-width:0}
figcaption{margin-top:8px;max-width:480px}
figure h3{margin:0 0 10px;overflow-wrap:anywhere}
svg{display:block;width:100%;max-width:480px;height:auto}
svg text{font:12.5px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--ink)}
svg .tick,svg .axis{fill:var(--soft);font-size:11.5px}
svg .label,svg .cap-name{paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}
svg .strong{font-weight:600}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .thread{stroke:var(--hatch);stroke-width:.8}
svg .whisker{stroke:var(--ink);stroke-width:1.3;opacity:.75}
svg .front{fill:none;stroke:var(--soft);stroke-width:1.4;stroke-dasharray:1 4;stroke-linecap:round}
svg .beaten{fill:var(--beaten)}
svg .track{fill:var(--track)}
svg .reference{stroke:var(--soft);stroke-width:1.2;stroke-dasharray:4 4}
svg .cap{stroke:var(--cap);stroke-width:1.4}
svg .cap-name{fill:var(--cap);font-size:11.5px}
svg .range{stroke-width:4;stroke-linecap:round;opacity:.55}
svg .range.thin{stroke-width:1.6;opacity:.8}
svg .curve{fill:none;stroke-width:2;stroke-linejoin:round}
.is-gguf{fill:var(--gguf)}.is-onnx{fill:var(--onnx)}.is-pte{fill:var(--pte)}
.is-torch{fill:var(--torch)}.is-other{fill:var(--other)}
svg .line-gguf{stroke:var(--gguf)}svg .line-onnx{stroke:var(--onnx)}svg .line-pte{stroke:var(--pte)}
svg .line-torch{stroke:var(--torch)}
svg .line-other{stroke:var(--other)}
svg .light{opacity:.38}
svg .published,svg .projected{fill:url(#hatch)}.hatch-paper{fill:var(--panel)}.hatch-line{fill:var(--hatch)}
blockquote{margin:0 0 16px;padding:2px 0 2px 16px;border-left:3px solid var(--onnx);white-space:pre-wrap;
overflow-wrap:anywhere}
dl{margin:0}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:18px 28px}
.answers div,.card{min-width:0}
.answers dt{font-weight:600;font-size:.9rem}
.answers dd{margin:4px 0 0;padding:10px 14px;background:var(--panel);border-radius:6px;white-space:pre-wrap;
overflow-wrap:anywhere}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:6px 20px;font-size:.9rem}
.facts dt{color:var(--soft)}
.facts dd{margin:0;overflow-wrap:anywhere}
pre{margin:0;padding:12px 14px;background:var(--panel);border-radius:6px;overflow-x:auto;font-size:.84rem}
:focus-visible{outline:2px solid var(--gguf);outline-offset:3px}
@media(max-width:560px){main{padding:24px 16px 48px}h2{margin-top:40px}
.badge{margin-left:0}.facts{grid-template-columns:1fr;gap:2px}.facts dd{margin-bottom:8px}}
@media print{:root{--paper:#fff;--panel:#f6f4f0;font-size:11px}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
body{font-size:11px}main{max-width:none;padding:0}h2{margin-top:24px;break-after:avoid}
figure,.card,tr,.answers div{break-inside:avoid}
.scroll{overflow:visible}table{font-size:8px}th,td{padding:4px 3px}thead th{min-width:0;font-size:7.5px}
tbody th{min-width:70px}th:first-child{position:static}small{font-size:6.5px}
.plots{grid-template-columns:1fr 1fr;gap:20px}.cards{grid-template-columns:1fr 1fr}
pre{white-space:pre-wrap;overflow-wrap:anywhere}}
"""
