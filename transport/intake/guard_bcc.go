//go:build !mutant_bcc

package intake

// hidesBcc says that Bcc fields are removed from what is submitted. The tag mutant_bcc takes the
// guard out, and the tests must notice.
const hidesBcc = true
