import abc

from keras_cc.options import Options
from keras_cc.passes import pairing


class Connection(Options):
    """What training changes in the forward pass: the options, and how a pass uses them.

    A connection holds options alone. Its layers belong to the model that is connected
    (`keras_cc.backbones.surgery.connect` makes them from here), and everything that happens
    during a forward pass is kept in the pass (`keras_cc.passes.pairing`).

    Subclasses are `FusedConnection`, `SelectedConnection` and `FlareConnection`.
    """

    #: Weight of the alignment error in the loss; 0 where a connection has none.
    alignment_loss_weight = 0.0
    #: Whether the alignment error and the mean gate are worth showing.
    has_gates = False
    #: Whether the alignment error is taken in rows without a pivot too.
    aligns_all = False
    #: Whether training learns something from a pair of prompts without an answer.
    learns_from_prompts = False
    #: Whether the connection reads or changes sites of the blocks (`keras_cc.backbones.taps`).
    needs_taps = False
    #: Whether the pivot's pass goes on over the target's answer, token by token.
    reads_answer = False
    #: Whether no gradient goes into the pivot's pass.
    pivot_is_constant = False
    #: Whether several pairs may share a row.
    packs = False

    @property
    def obstacle(self):
        """Why `merge()` cannot give a stock model of the monolingual path, or None: it can."""
        return None

    def block_numbers(self, num_blocks):
        """The blocks whose layers are wrapped, sorted, from 0."""
        return []

    def paths(self, family):
        """Which layers of such a block: their names, and their paths in it."""
        return {"feed_forward": family.projection}

    def wrap(self, inner, **kwargs):
        """The layer around `inner` that takes its place."""
        raise NotImplementedError

    def own_layers(self, num_blocks, dim):
        """Built layers that the connection has once a model, by name."""
        return {}

    @abc.abstractmethod
    def pivot_pass(self, mask, num_blocks, segments=None):
        """The `PivotPass` for pivot prompts with the padding mask `mask`, bool `(B, S)`.

        Where it `packs`, `segments` are those of packed rows, int `(B, S)`.
        """

    @abc.abstractmethod
    def target_pass(self, inputs, pivot, layers, training=False, seed=None):
        """The connected pass.

        Args:
            inputs: the dict of a call.
            pivot: the finished pivot pass.
            layers: what `keras_cc.backbones.surgery.connect` returned.
            training: bool.
            seed: a `keras.random.SeedGenerator`.

        Returns:
            A `keras_cc.passes.pairing.Pass`.
        """

    def english_pass(self, mask):
        """The pass that a row in the pivot's language gets, its mask bool `(B, T)`."""
        return pairing.PivotPass(mask)

    def own_pass(self, num_blocks):
        """The pass over the target's own prompt that comes before a monolingual one, or None."""
        return None

    def monolingual_pass(self, inputs, own, layers):
        """The pass that a user gets.

        Args:
            inputs: the dict of a call.
            own: the finished `own_pass`, or None.
            layers: what `keras_cc.backbones.surgery.connect` returned.

        Returns:
            A `keras_cc.passes.pairing.Pass`.
        """
        return pairing.Pass()

    def extend(self, scope, inputs):
        """Have a connected `scope` go on over the tokens that are generated, if it does."""
        return None  # a body of its own, since TensorFlow's AutoGraph reads the source

    def outputs(self, scope):
        """What a connected pass leaves in the model's outputs, tensors by name."""
        return {}
