"""calibrate: for each site the k that a model needs for its outputs on the user's own data.

calibrate    the function: measures, allocates, verifies, prints
traced       the model, traced once, run with any configuration
statistics   one dense run: what each site would lose at each k
metric       how far outputs are from the dense ones
allocation   from what sites lose to the order in which keys are given up
search       how far along that order the budget reaches, in few measured runs
progress, table   what is printed
"""

from .calibrate import calibrate as calibrate
