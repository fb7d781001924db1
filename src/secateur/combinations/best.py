"""The best in one shot: alps, matrices corrected towards the dense model (--error-correction auto), uniform sparsity.

A name for the method and settings that have given the lowest perplexity here among those that train nothing, both
unstructured and N:M. It is what is done where no method is named. With ``--structure`` it stands for the default there:
mixed, with hidden channels obs, for experts reap.

A recipe replaces the name by what it stands for, before anything else looks at it. So a result says what was done, and
goes on saying it when the name comes to stand for something better. Whatever is said beside the name wins over it:
``--error-correction off`` leaves alps alone. Options of the method are those of alps.

It takes calibration data, a dense forward beside the pruned one, and the time of alps. sparsegpt takes about half as
long, wanda less, magnitude no data. Stacked experts are not corrected, and the result says so for each.
"""

from __future__ import annotations

METHOD = "alps"
"""The method."""
ERROR_CORRECTION = "auto"
"""The ``error_correction`` of the recipe."""
