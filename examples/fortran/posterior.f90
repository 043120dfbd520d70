! Means and standard deviations of a flow, and the mean of its log-density: as a simulation would ask for them, array by array.
program posterior
    use, intrinsic :: iso_fortran_env, only: int64, real64
    use fastmaf
    implicit none
    integer, parameter :: draws = 100000
    type(flow_model) :: model
    type(flow_evaluator) :: flow
    character(len=1000) :: file, text
    real(real64), allocatable :: x(:, :), log_prob(:)
    integer :: d, stat

    call get_command_argument(1, file)
    call model%open(trim(file), stat, text)
    if (stat /= fastmaf_ok) then
        write (*, "(a)") trim(text)
        error stop 1
    end if
    call flow%create(model)
    allocate (x(model%features(), draws), log_prob(draws))
    call flow%sample(x, seed=1_int64, log_prob=log_prob)
    do d = 1, size(x, 1)
        associate (mean => sum(x(d, :)) / draws)
            write (*, "(a, i3, 2(a, f12.6))") "variable", d, ": mean ", mean, &
                ", standard deviation ", sqrt(sum((x(d, :) - mean)**2) / draws)
        end associate
    end do
    write (*, "(a, f12.6)") "mean log_prob ", sum(log_prob) / draws
end program
