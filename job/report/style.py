"""The style sheet of a report: system fonts, one column on a phone, light and dark."""

CSS = """
:root{color-scheme:light dark;--page:#f7f7f5;--card:#fff;--text:#1b1d20;--muted:#5c636c;--line:#e3e4e1;--soft:#f0f0ed;
--good:#0a6b4f;--bad:#a3261b;
--c0:#1463b0;--c1:#c4570c;--c2:#0d8060;--c3:#8b3f92;--c4:#9a7f00;--c5:#7b828b;--c6:#0b8fa6;--c7:#b3243c}
@media(prefers-color-scheme:dark){:root{--page:#131518;--card:#1b1e22;--text:#e7e9ec;--muted:#9ba3ad;--line:#2d3238;
--soft:#24282d;
--good:#5fd3a8;--bad:#ff9a8f;--c0:#6aaef2;--c1:#f0a05a;--c2:#4fc9a0;--c3:#d391d9;--c4:#d9c14a;--c5:#8d959f;--c6:#5ac6d8;
--c7:#f4808f}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--text);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1060px;margin:0 auto;padding:44px 24px 64px}
h1{font-size:34px;line-height:1.15;letter-spacing:-.02em;margin:6px 0 12px;overflow-wrap:anywhere;font-weight:680}
h2{font-size:20px;letter-spacing:-.01em;margin:52px 0 4px;font-weight:650}
h3{font-size:15px;margin:0 0 8px;font-weight:620}
p{margin:0 0 12px;max-width:70ch}
.over{color:var(--muted);font-size:13px;letter-spacing:.02em;display:flex;gap:10px;align-items:center;flex-wrap:wrap}
.pill{border:1px solid var(--line);border-radius:99px;padding:1px 10px;font-size:12.5px;color:var(--text);
background:var(--card)}
.pill.done{color:var(--good);border-color:currentColor}
.lead{font-size:18px;line-height:1.5}
.chart+.note{margin-top:10px}
.note,.nothing{color:var(--muted);font-size:14px}
.nothing{padding:20px 0;margin:0}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:14px;margin:26px 0 0}
.card,.tile{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile{padding:16px 18px 14px}
.tile span{display:block;color:var(--muted);font-size:13px;line-height:1.35}
.tile strong{display:block;font-size:30px;line-height:1.25;letter-spacing:-.02em;font-weight:640;
font-variant-numeric:tabular-nums;margin-top:4px}
.tile em{font-style:normal;font-size:13.5px;color:var(--muted);font-variant-numeric:tabular-nums}
.delta,.tile .delta{display:inline;font-weight:600;font-size:inherit}.delta.up{color:var(--good)}.delta.down{color:var(--bad)}
.grid2{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:14px;margin-top:14px}
.card{padding:18px 20px 14px;min-width:0}
.card.wide{margin-top:14px}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th{font-weight:550;color:var(--muted);text-align:left;font-size:13px;white-space:nowrap}
th,td{padding:7px 14px 7px 0;border-bottom:1px solid var(--line);vertical-align:top;overflow-wrap:break-word}
tr:last-child td{border-bottom:0}
th:last-child,td:last-child{padding-right:0}
td.n,th.n{text-align:right;white-space:nowrap}
.scroll{overflow-x:auto}
code,pre{font:13.5px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--soft);border-radius:8px;padding:14px 16px;margin:10px 0;overflow-x:auto}
details{margin-top:10px}summary{cursor:pointer;color:var(--muted);font-size:14px}
svg{display:block}
.chart{width:100%;height:auto;overflow:visible}
.tick{font-size:12px;fill:var(--muted);font-variant-numeric:tabular-nums}.label{font-size:12px;fill:var(--muted)}
.grid{stroke:var(--line)}.axis{stroke:var(--muted);stroke-opacity:.6}.guide{stroke:var(--muted);stroke-dasharray:3 4;
stroke-opacity:.8}
.fine{stroke-width:1.5!important}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:butt}
.band{fill:var(--c);fill-opacity:.16}.dot{fill:var(--c)}.piece{fill:var(--c)}
.bubble{fill:var(--c);fill-opacity:.35;stroke:var(--c);stroke-width:1.5}
.lost{fill:var(--c7);fill-opacity:.45}.ring{fill:none;stroke:var(--text);stroke-width:1.5}
.hit rect{fill:transparent}.hit line{stroke:var(--text);stroke-opacity:0;pointer-events:none}.hit:hover line{stroke-opacity:.4}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}.c6{--c:var(--c6)}
.c7{--c:var(--c7)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:0 0 8px;padding:0;font-size:13px;color:var(--muted)}
.legend li{display:flex;gap:7px;align-items:center;min-width:0;overflow-wrap:anywhere}
.legend svg{flex:none}
.strip{border-radius:5px;background:var(--soft);overflow:visible}.strip.plain{background:none}
.shares{list-style:none;margin:14px 0 4px;padding:0;display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));
gap:4px 32px;font-size:14px}
.shares li{display:grid;grid-template-columns:12px 1fr auto 64px;gap:9px;align-items:center;font-variant-numeric:tabular-nums}
.shares b{font-weight:600}.shares i{font-style:normal;color:var(--muted);text-align:right}
.swatch{width:12px;height:12px;border-radius:3px;background:var(--c)}
.timeline{display:grid;grid-template-columns:auto minmax(0,1fr) auto;gap:6px 16px;align-items:center;font-size:13.5px}
.who{white-space:nowrap}.code{color:var(--muted);white-space:nowrap;font-variant-numeric:tabular-nums}
.looks{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:14px;margin-top:14px}
.look{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px;min-width:0}
.look header{display:grid;grid-template-columns:88px minmax(0,1fr);gap:14px;margin-bottom:12px}
.look img,.noimage{width:88px;height:88px;object-fit:contain;border-radius:6px;object-position:left top}
.noimage{background:var(--soft);color:var(--muted);font-size:12px;display:grid;place-items:center}
.caption{font-weight:600;line-height:1.35;overflow-wrap:anywhere;display:-webkit-box;-webkit-line-clamp:3;
-webkit-box-orient:vertical;overflow:hidden;margin:0}
.key{color:var(--muted);font-size:12px;overflow-wrap:anywhere;margin:4px 0 0;display:-webkit-box;-webkit-line-clamp:2;
-webkit-box-orient:vertical;overflow:hidden}
.sides{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px}
.more>.looks{margin-top:12px}
.sides h4{margin:0 0 5px;font-size:12.5px;font-weight:550;color:var(--muted);display:flex;justify-content:space-between;gap:6px}
.sides ol{list-style:none;margin:0;padding:0;font-size:13.5px;line-height:1.3}
.sides li{position:relative;display:grid;grid-template-columns:minmax(0,1fr) auto;gap:8px;padding:3px 0 5px}
.sides li::after{content:"";position:absolute;left:0;bottom:0;height:2px;width:var(--w);background:var(--c5);
border-radius:1px;opacity:.7}
.sides li.yes{font-weight:620;color:var(--good)}.sides li.yes::after{background:var(--good);opacity:1}
.said{white-space:nowrap;overflow:hidden;text-overflow:ellipsis}.said,.caption{unicode-bidi:isolate}
.sides li b{font-weight:500;color:var(--muted);font-variant-numeric:tabular-nums;font-size:12.5px}
footer{margin-top:56px;padding-top:16px;border-top:1px solid var(--line);color:var(--muted);font-size:13px;
overflow-wrap:anywhere}
td.who{white-space:nowrap}
@media(max-width:760px){.chart .tick,.chart .label{font-size:16px}.chart .label.y{display:none}main{padding:26px 16px 44px}
h1{font-size:27px}.lead{font-size:16.5px}h2{margin-top:40px}
.tiles{grid-template-columns:repeat(2,1fr);gap:10px}.tile{padding:12px 14px}.tile strong{font-size:24px}
.grid2,.looks{grid-template-columns:minmax(0,1fr)}.card{padding:14px 14px 10px}.timeline{gap:5px 14px;font-size:12.5px}
.shares{grid-template-columns:1fr}}
@media print{:root{color-scheme:light}.card,.look,.tile{break-inside:avoid}}
"""
