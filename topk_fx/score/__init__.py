"""The score language: what happens between Q K^T and the product with V, as a line of text.

`language` reads and writes the text, `operations` says what each operation computes and how it is differentiated, and
`replay` does both at whatever positions of the scores a lowering is working on.
"""

from .language import Binding as Binding
from .language import Call as Call
from .language import Expression as Expression
from .language import Name as Name
from .language import Operand as Operand
from .language import Program as Program
from .language import Score as Score
from .language import Step as Step
from .language import check_operands as check_operands
from .operations import OPERATIONS as OPERATIONS
from .replay import Positions as Positions
from .replay import differentiate as differentiate
from .replay import evaluate as evaluate
from .replay import evaluate_name as evaluate_name
