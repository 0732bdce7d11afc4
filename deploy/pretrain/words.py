"""The words that signs say: upper-case English words of three and four letters that an OCR engine reads apart."""

from typing import Final

# fmt: off
WORDS: Final[tuple[str, ...]] = (
    "ART", "BAR", "BED", "BUS", "CAB", "CAR", "CUP", "DEN", "FAN", "FLY", "FUN", "GAS", "GYM", "HAT", "HOT",
    "ICE", "INK", "JAM", "JET", "KEY", "MAP", "NEW", "OAK", "PET", "PIE", "PUB", "RED", "RUN", "SEA", "SKY",
    "SPA", "SUN", "TAX", "TEA", "TOY", "VAN", "WAX", "WET", "YES", "ZIP", "AREA", "BABY", "BAKE", "BANK",
    "BATH", "BEER", "BIKE", "BIRD", "BLUE", "BOAT", "BOOK", "CAFE", "CAKE", "CASH", "CITY", "CLUB", "COLD",
    "DATE", "DESK", "DINE", "DOCK", "EAST", "EXIT", "FAST", "FILM", "FIRE", "FISH", "FOOD", "FREE", "FUEL",
    "GATE", "GIFT", "GOLD", "GRAB", "HALL", "HELP", "HOME", "HUNT", "IDLE", "JAZZ", "JUMP", "KIDS", "KING",
    "LAKE", "LIFT", "MAIL", "MARK", "MEAT", "MENU", "MILK", "MINT", "NEWS", "NEXT", "OPEN", "PARK", "PATH",
    "PLAY", "QUIZ", "RENT", "RICE", "SALE", "SHIP", "SIZE", "SNOW", "STAR", "STOP", "TAXI", "TIME", "TREE",
    "UNIT", "VIEW", "WASH", "WAVE", "WEST", "WIFI", "WINE", "WORK", "YARD", "ZERO",
)
# fmt: on

SURFACES: Final = ("sign", "card", "flag")
"""What a word stands on; the three look different, and their names have equal lengths."""

LETTER_COLORS: Final = ("red", "blue", "green", "purple", "black")
"""The task colors dark enough to be read on a light surface."""
