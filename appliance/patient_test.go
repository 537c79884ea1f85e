package appliance

import (
	"errors"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"
)

// The other side takes nothing for a minute and says all the while that it is busy;
// then it falls silent.
func TestAWriteMayStandForAsLongAsTheOtherSideIsHeard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		defer there.Close()
		ended := 0
		p := &patient{Conn: here, ended: func() { ended++ }}
		defer p.Close()
		go func() {
			for b := make([]byte, 1); ; {
				if _, err := p.Read(b); err != nil {
					return
				}
			}
		}()
		go func() {
			for range 30 {
				time.Sleep(2 * time.Second)
				if _, err := there.Write([]byte{0}); err != nil {
					return
				}
			}
		}()
		began := time.Now()
		p.SetWriteDeadline(began.Add(5 * time.Second))
		_, err := p.Write([]byte{0})
		if took := time.Since(began); !errors.Is(err, os.ErrDeadlineExceeded) || took != 65*time.Second || ended != 1 {
			t.Errorf("it stood for %v: %v, told %d times", took, err, ended)
		}
		here.Close()
		time.Sleep(2 * time.Second)
	})
}
