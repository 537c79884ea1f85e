//go:build !mutant_smuggling

package smtpout

// guardLineEnds: a text with a bare CR or LF never leaves. The build tag takes
// the guard out, so that a run of the tests shows that they would notice.
const guardLineEnds = true
