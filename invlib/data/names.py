"""What the data sets, their classes and the embedded photographs are called, for captions."""

# in the order of their rows; the licences are spelt out in data/README.md
PHOTOGRAPHS = (
    "'astronaut' (NASA, public domain)",
    "'chelsea' (Stéfan van der Walt, CC0)",
    "'coffee' (Rachel Michetti, CC0)",
    "'rocket' (SpaceX, public domain)",
)
TITLES = {
    "photos224": "four photographs from scikit-image (public domain and CC0), 224×224",
    "photos64": "four photographs from scikit-image (public domain and CC0), 64×64",
    "photos32": "four photographs from scikit-image (public domain and CC0), 32×32",
    "patches32": "sixty 32×32 patches of photographs from scikit-image (public domain and CC0)",
    "fashion": "a hundred test images of Fashion-MNIST (Zalando, MIT), padded to 32×32",
    "CIFAR10": "CIFAR-10",
    "CIFAR100": "CIFAR-100",
    "MNIST": "MNIST, padded to 32×32",
    "FashionMNIST": "Fashion-MNIST, padded to 32×32",
    "ImageNet": "ImageNet (ILSVRC 2012)",
}
_PHOTOGRAPH_NAMES = ("astronaut", "chelsea", "coffee", "rocket")
_FASHION = "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel
can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree
pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea
seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CLASSES: dict[str, tuple[str, ...]] = {
    "photos224": _PHOTOGRAPH_NAMES,
    "photos64": _PHOTOGRAPH_NAMES,
    "photos32": _PHOTOGRAPH_NAMES,
    "fashion": tuple(_FASHION.split(", ")),
    "FashionMNIST": tuple(_FASHION.split(", ")),
    "MNIST": tuple("0123456789"),
    "CIFAR10": tuple(_CIFAR10.split()),
    "CIFAR100": tuple(_CIFAR100.split()),
}
