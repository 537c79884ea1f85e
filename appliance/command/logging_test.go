package command

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestLogLinesWaitAMomentAndWarningsDoNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		l := newLines(&out)
		log := slog.New(prompt{slog.NewJSONHandler(l, nil), l}).With("node", "plzen")
		log.Info("first")
		log.Info("second")
		if out.Len() != 0 {
			t.Fatalf("written at once: %s", &out)
		}
		time.Sleep(linesDelay)
		synctest.Wait()
		if n := strings.Count(out.String(), "\n"); n != 2 {
			t.Fatalf("%d lines after %v", n, linesDelay)
		}
		log.Info("third")
		log.Warn("fourth")
		if n := strings.Count(out.String(), "\n"); n != 4 {
			t.Fatalf("%d lines after a warning", n)
		}
		log.Info("fifth")
		l.Flush()
		if !strings.HasSuffix(strings.TrimSpace(out.String()), `"msg":"fifth","node":"plzen"}`) {
			t.Fatalf("the last line is missing: %s", &out)
		}
	})
}
