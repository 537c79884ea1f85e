//go:build !mutant_unsealed

package identity

// sealing says that Seal seals. The tag mutant_unsealed takes the guard out, and
// the tests must notice.
const sealing = true
