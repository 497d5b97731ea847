"""A manifest or a comparison as one HTML page that needs no network: totals, figures, and every figure as a table.

``manifests`` says what is read of ``lrmerge.json``, ``content`` brings all verbs into one form, ``charts`` draws, and
``html`` writes. Figures are Vega-Lite's, whose runtime comes from vl-convert: of the plotting libraries that work
without a network it draws SVG, which a page can style for light, dark and paper, and is the smallest (0.9 MB; Plotly's
is 4.6 MB, Bokeh draws on a canvas). Specifications are plain data: Altair would check them, and takes seconds for it.
"""
