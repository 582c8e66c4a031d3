from studies.claims.run import main
from support.common import guarded

guarded(main)
