package transport

import (
	"errors"
	"fmt"
)

// Fault is an error that an SMTP client, or another node, may be told. Its
// public part never holds secrets, paths or foreign bytes; Cause stays here.
type Fault struct {
	Code     int    // SMTP reply code, 400–599
	Enhanced string // RFC 3463, such as "5.1.1"
	Text     string // one line of ASCII (UTF-8 only where SMTPUTF8 was agreed)
	Cause    error  // private; may be nil
}

// Error includes the private cause: it is for logs.
func (f *Fault) Error() string {
	if f.Cause != nil {
		return fmt.Sprintf("%d %s %s: %v", f.Code, f.Enhanced, f.Text, f.Cause)
	}
	return fmt.Sprintf("%d %s %s", f.Code, f.Enhanced, f.Text)
}

// Unwrap returns the private cause.
func (f *Fault) Unwrap() error { return f.Cause }

// Temporary reports whether trying again may help.
func (f *Fault) Temporary() bool { return f.Code < 500 }

// AsFault finds the Fault in err's chain. Everything unknown becomes
// 451 4.3.0 with err as its private cause; nil stays nil.
func AsFault(err error) *Fault {
	if err == nil {
		return nil
	}
	var f *Fault
	if errors.As(err, &f) {
		return f
	}
	return &Fault{451, "4.3.0", "Local error, try again later", err}
}

// Faultf makes a Fault without a private cause.
func Faultf(code int, enhanced, format string, args ...any) *Fault {
	return &Fault{Code: code, Enhanced: enhanced, Text: fmt.Sprintf(format, args...)}
}

// Result turns a fault into the result of a recipient.
func (f *Fault) Result(by string) Result {
	o := Failed
	if f.Temporary() {
		o = Deferred
	}
	return Result{Outcome: o, Code: f.Code, Enhanced: f.Enhanced, Text: f.Text, By: by}
}

// ErrNoSpace is the fault of every acceptance while the disk is below its
// floor: RFC 5321 section 4.2.3, 452.
var ErrNoSpace = &Fault{Code: 452, Enhanced: "4.3.1", Text: "Insufficient system storage, try again later"}

// ErrUncertain says that a message may be in custody or not: its record was
// begun, and neither its end nor its absence is known (the log failed, or
// nobody waited any longer). Whoever gave the message is told neither yes nor
// no: the connection ends without an answer, as RFC 5321 section 4.2.5 has it
// for a server that cannot answer.
var ErrUncertain = errors.New("it is not known whether the message was stored")
