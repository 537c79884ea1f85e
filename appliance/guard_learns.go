//go:build !mutant_learns

package appliance

// saysWhatItLearns says that a node tells its peers when it can take what it turned away as not its own. The tag mutant_learns takes the
// guard out, and the tests must notice.
const saysWhatItLearns = true
