//go:build !mutant_strangers

package appliance

// asksAboutStrangers says that a node which is behind asks those that vote about a key that it does not know. The tag mutant_strangers takes the
// guard out, and the tests must notice.
const asksAboutStrangers = true
