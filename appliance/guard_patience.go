//go:build !mutant_patience

package appliance

// hearingIsProgress says that a write may stand for as long as something comes in.
// The tag mutant_patience takes the guard out, and the tests must notice.
const hearingIsProgress = true
